"""llama.cpp's server as a peer: adapters are asked for by the numbers under which it lists them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtest.client import ClientOptions
from loadtest.llama_route import LlamaCpp
from loadtest.llama_server import adapter_ids
from loadtest.outcome import Outcome
from loadtest.peer_servers import DRAIN_S, play_whole
from loadtest.stage import Stage
from loadtest.trace import Trace


@dataclass(slots=True, kw_only=True)
class LlamaServer:
    """A server of llama.cpp's that runs already at `url` (``http://host:port``); `fields` are further fields of each
    request's body."""

    stage: Stage
    name: str
    url: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)

    def prepare(self, adapters: Sequence[str]) -> tuple[str, ...]:
        """Learn the adapters' numbers; RuntimeError for one that the server was not started with."""
        self.ids = adapter_ids(self.url, peer=self.name, api_key=self.stage.options.api_key)
        missing = [name for name in adapters if name not in self.ids]
        if missing:
            raise RuntimeError(
                f"peer {self.name}: the server at {self.url} was started without adapter {missing[0]!r}, and takes "
                f"none while it runs; start it with --lora {missing[0]}.gguf and the others (`python -m loadtest "
                "make-gguf` makes the files and says the whole command)"
            )
        return ()

    def play(self, trace: Trace, *, paced: bool) -> list[Outcome]:
        """See `Peer`."""
        return play_whole(self.stage, self.client(), trace, self.name, paced=paced)

    def client(self) -> ClientOptions:
        """How to ask it, each time by a new connection: it closes one after a stream, and does not say so."""
        return ClientOptions(
            url=self.url,
            route=LlamaCpp(ids=self.ids, fields=self.fields),
            api_key=self.stage.options.api_key,
            drain_s=DRAIN_S,
            keeps_connections=False,
        )
