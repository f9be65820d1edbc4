"""Servers as peers: ours, started for each pass, and any OpenAI-compatible one by its URL."""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from loadtest.client import ClientOptions
from loadtest.outcome import Outcome
from loadtest.peers import population
from loadtest.routes import Completions, Native, Route
from loadtest.stage import Stage
from loadtest.trace import BASE, Trace, TraceRequest

NOBODY = "a-name-that-no-server-knows"
DRAIN_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OurServer:
    """This server, with an empty store, the trace's adapters uploaded and used once before the clock starts."""

    stage: Stage
    name: str
    route: Route = field(default_factory=Native)

    def prepare(self, adapters: Sequence[str]) -> tuple[str, ...]:
        """See that there is a server at ``--url``, and make the adapters' folders."""
        self.stage.reach()
        self.stage.adapter_folders(population(adapters))
        return ()

    def play(self, trace: Trace, *, paced: bool) -> list[Outcome]:
        """See `Peer`."""
        with self.stage.server(num_adapters=population(trace.adapters)) as server:
            self.stage.warm(server, tuple(trace.adapters))
            client = ClientOptions(
                url=server.url, route=self.route, api_key=self.stage.options.api_key, drain_s=DRAIN_S
            )
            return play_whole(self.stage, client, trace, self.name, paced=paced)


@dataclass(slots=True, kw_only=True)
class OpenAIServer:
    """A server that runs already. `url` is its address with OpenAI's prefix (``http://host:port/v1``), `fields`
    are further fields of each request's body by model name (see `Completions`). `base_model` is what the base is
    called there; None takes the first model that it lists."""

    stage: Stage
    name: str
    url: str
    base_model: str | None = None
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def prepare(self, adapters: Sequence[str]) -> tuple[str, ...]:
        """Ask each model for one token. A server that answers to a name that cannot exist does not tell models
        apart by name: that is said, since then nothing but the answers shows that adapters are applied."""
        if self.base_model is None:
            self.base_model = self._first_model()
        for name in (self.base_model, *adapters):
            refusal = self._refusal(name)
            if refusal is not None:
                raise RuntimeError(self._unknown(name, refusal))
        if adapters and self._refusal(NOBODY) is None and not set(adapters) <= set(self.fields):
            return (
                f"{self.name} answers to model names that it cannot know: whether it applied the adapters shows "
                "only in the answers",
            )
        return ()

    def play(self, trace: Trace, *, paced: bool) -> list[Outcome]:
        """See `Peer`."""
        return play_whole(self.stage, self.client(), trace, self.name, paced=paced)

    def client(self) -> ClientOptions:
        """How to ask it."""
        assert self.base_model is not None, "prepare comes first"
        where = urlsplit(self.url)
        path = f"{where.path.rstrip('/') or '/v1'}/completions"
        route = Completions(base_model=self.base_model, path=path, fields=self.fields)
        key = self.stage.options.api_key
        return ClientOptions(url=f"{where.scheme}://{where.netloc}", route=route, api_key=key, drain_s=DRAIN_S)

    def _first_model(self) -> str:
        status, body = self._send("/models", None)
        try:
            return str(json.loads(body)["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise RuntimeError(
                f"peer {self.name}: {self.url}/models lists no model (status {status}); name the base yourself: "
                f"--peer openai:{self.name}={self.url}#MODEL"
            ) from None

    def _refusal(self, model: str) -> str | None:
        """What the server says against one token of this model; None if it answers."""
        asked = TraceRequest(
            index=0,
            arrival_s=0.0,
            adapter=BASE if model == self.base_model else model,
            text="a",
            prompt_tokens=1,
            max_new_tokens=1,
        )
        route = self.client().route
        body = {**route.ask(asked).body, "stream": False}
        body.pop("stream_options", None)
        status, said = self._send("/completions", body)
        return None if status == 200 else f"status {status}: {' '.join(said.split())[:300]}"

    def _send(self, path: str, body: dict[str, Any] | None) -> tuple[int, str]:
        where = urlsplit(self.url)
        address = f"{where.scheme}://{where.netloc}{where.path.rstrip('/') or '/v1'}{path}"
        headers = {"Content-Type": "application/json"}
        if self.stage.options.api_key:
            headers["Authorization"] = f"Bearer {self.stage.options.api_key}"
        sent = None if body is None else json.dumps(body).encode()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(urllib.request.Request(address, sent, headers), timeout=600.0) as answer:
                return answer.status, answer.read().decode(errors="replace")
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code, refused.read().decode(errors="replace")
        except OSError as problem:
            raise RuntimeError(f"peer {self.name}: nobody answers at {address} ({problem})") from None

    def _unknown(self, model: str, said: str) -> str:
        if model == self.base_model:
            return f"peer {self.name}: the base model {model!r} does not answer at {self.url}: {said}"
        return (
            f"peer {self.name}: {self.url} does not know the adapter {model!r} as a model: {said}\n"
            f"Start it with the trace's adapters under their names; vLLM: --enable-lora --lora-modules "
            f"{model}={self.stage.adapters_folder() / model} ... (one for each). A server that names adapters in "
            "another way can be told how with --peer-fields"
        )


def play_whole(stage: Stage, client: ClientOptions, trace: Trace, label: str, *, paced: bool) -> list[Outcome]:
    """Play a trace at its own pace, or as a backlog that is all there from the start."""
    if paced:
        return stage.play(client, trace, label)
    return stage.play(client, trace.at_once(), label, concurrency=len(trace.requests))
