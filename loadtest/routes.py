"""Routes: how a request of a trace is put to a server, and how its answer is read from the stream.

A stream is recorded as it comes, payload by payload with its time, and read only when it is over: a client that
parses every token while others wait would take the processor from the server under test.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from loadtest.trace import BASE, TraceRequest

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request to be sent as JSON by POST."""

    path: str
    body: dict[str, Any]
    query: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a stream amounts to. `token_times_s` has one time for each token; `prompt_tokens` is None where the
    server does not say; `error` is None if the answer is whole."""

    text: str = ""
    token_times_s: tuple[float, ...] = ()
    prompt_tokens: int | None = None
    error: str | None = None


class Route(Protocol):
    """How to ask, and how to read the answer."""

    def ask(self, request: TraceRequest) -> Ask:
        """What to send for exactly `max_new_tokens` greedy tokens."""
        ...

    def read(self, request: TraceRequest, pieces: Sequence[bytes], times_s: Sequence[float]) -> Answer:
        """The answer in the payloads `pieces`, which came at `times_s`. ValueError if they are not JSON."""
        ...


@dataclass(frozen=True, slots=True)
class Native:
    """``/generate_stream``: text in, an event for each token, the whole text in the last."""

    def ask(self, request: TraceRequest) -> Ask:
        """See `Route`; the adapter is named in the query."""
        parameters = {"max_new_tokens": request.max_new_tokens, "ignore_eos": True}
        return Ask(
            path="/generate_stream",
            body={"inputs": request.text, "parameters": parameters},
            query={"adapter": request.adapter} if request.adapter != BASE else {},
        )

    def read(self, request: TraceRequest, pieces: Sequence[bytes], times_s: Sequence[float]) -> Answer:
        """See `Route`; how long the prompt was is in a header of the response."""
        if not pieces:
            return Answer(error="empty stream")
        last = json.loads(pieces[-1])
        if "error" in last:
            said = f"stream error: {last.get('error_type') or 'unknown'}"
            return Answer(token_times_s=tuple(times_s[:-1]), error=said)
        text = last.get("generated_text") or ""
        return Answer(text=text, token_times_s=tuple(times_s), error=wrong_length(len(pieces), request))


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """OpenAI's ``/v1/completions``, as this server and others speak it; an adapter is named as the `model`.

    `encode` sends token ids in place of text, exact on any base. `fields` are further fields of the body by model
    name, those under ``*`` for all: what a server calls its own (``{"*": {"ignore_eos_token": true}}``) or needs
    to find an adapter (``{"a00001": {"lora": [{"id": 1, "scale": 1.0}]}}``)."""

    base_model: str = "base"
    encode: Encode | None = None
    path: str = "/v1/completions"
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def ask(self, request: TraceRequest) -> Ask:
        """See `Route`. ``ignore_eos`` is no field of OpenAI's, but vLLM, llama.cpp and this server know it."""
        model = self.base_model if request.adapter == BASE else request.adapter
        body = {
            "model": model,
            "prompt": request.text if self.encode is None else self.encode(request.text),
            "max_tokens": request.max_new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return Ask(path=self.path, body={**body, **self.fields.get("*", {}), **self.fields.get(model, {})})

    def read(self, request: TraceRequest, pieces: Sequence[bytes], times_s: Sequence[float]) -> Answer:
        """See `Route`. Tokens are counted by the stream's ``usage`` where it has one, else by its chunks."""
        chunks: list[tuple[float, str]] = []
        usage: Mapping[str, Any] = {}
        for piece, when in zip(pieces, times_s, strict=True):
            event = json.loads(piece)
            if "error" in event:
                times = tuple(came for came, _ in chunks)
                return Answer(token_times_s=times, error=f"stream error: {_kind(event['error'])}")
            usage = event.get("usage") or usage
            choices = event.get("choices")
            if choices:
                chunks.append((when, choices[0].get("text") or ""))
        if not chunks:
            return Answer(error="empty stream")
        if not chunks[-1][1] and len(chunks) > usage.get("completion_tokens", request.max_new_tokens):
            del chunks[-1]  # a closing chunk of its own is no token
        count = int(usage.get("completion_tokens") or len(chunks))
        return Answer(
            text="".join(text for _, text in chunks),
            token_times_s=spread([came for came, _ in chunks], count),
            prompt_tokens=usage.get("prompt_tokens"),
            error=wrong_length(count, request),
        )


def spread(times_s: Sequence[float], count: int) -> tuple[float, ...]:
    """`count` token times from the times of as many chunks or fewer: chunks that bring several tokens at once
    are taken to bring equally many. The first token has the first chunk's time, the last one the last's."""
    if count <= 1:
        return tuple(times_s[:count])
    last = len(times_s) - 1
    return tuple(times_s[round(number * last / (count - 1))] for number in range(count))


def wrong_length(count: int, request: TraceRequest) -> str | None:
    """The error of an answer of `count` tokens; None if it has as many as were asked for."""
    return None if count == request.max_new_tokens else f"{count} tokens of {request.max_new_tokens}"


def _kind(error: Any) -> str:
    if isinstance(error, Mapping):
        return str(error.get("type") or error.get("code") or "unknown")
    return str(error)[:80]
