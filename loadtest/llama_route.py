"""llama.cpp's own route, ``/completion``: text in, an event for each token, adapters named by number.

A request's ``lora`` is the list of adapters to apply, and those that it does not name are off. An empty list would
mean the server's own setting, under which all its adapters may be on, so the base is asked for by switching the first
one off by name. Source: llama.cpp's ``tools/server/README.md``.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtest.routes import Answer, Ask, spread, wrong_length
from loadtest.trace import BASE, TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCpp:
    """`ids` are the adapters' numbers by name, as ``/lora-adapters`` lists them; `fields` are further fields of each
    request's body."""

    ids: Mapping[str, int] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    def ask(self, request: TraceRequest) -> Ask:
        """See `Route`; ValueError for an adapter that the server does not hold. One sampler that keeps the likeliest
        token is the least work that greedy choice can be there."""
        body = {
            "prompt": request.text,
            "n_predict": request.max_new_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "samplers": ["top_k"],
            "top_k": 1,
            "stream": True,
            "return_tokens": True,
            "lora": self._lora(request.adapter),
        }
        return Ask(path="/completion", body={**body, **self.fields})

    def _lora(self, adapter: str) -> list[dict[str, float]]:
        if adapter == BASE:
            return [{"id": 0, "scale": 0.0}] if self.ids else []
        if adapter not in self.ids:
            raise ValueError(f"adapter {adapter!r} is not among those that llama.cpp's server was started with")
        return [{"id": self.ids[adapter], "scale": 1.0}]

    def read(self, request: TraceRequest, pieces: Sequence[bytes], times_s: Sequence[float]) -> Answer:
        """See `Route`. The last event has no token and counts them all; an event may bring none where a token's
        bytes are no whole character yet."""
        text, came_s, last = "", list[float](), dict[str, Any]()
        for piece, when in zip(pieces, times_s, strict=True):
            last = json.loads(piece)
            if "error" in last:
                return Answer(token_times_s=tuple(came_s), error=f"stream error: {_kind(last['error'])}")
            text += last.get("content") or ""
            came_s += [when] * (not last.get("stop"))
        if not last.get("stop"):
            return Answer(text=text, token_times_s=tuple(came_s), error="empty stream" if not pieces else "cut off")
        count = int(last["tokens_predicted"])
        return Answer(
            text=text,
            token_times_s=spread(came_s or [times_s[-1]], count),
            prompt_tokens=last.get("tokens_evaluated"),
            error=wrong_length(count, request),
        )


def _kind(error: Any) -> str:
    return str(error.get("type") or error.get("code")) if isinstance(error, Mapping) else str(error)[:80]
