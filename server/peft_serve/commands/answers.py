"""One answer as it comes: the text so far, its times, and what became of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from peft_serve.commands.exits import CommandFailed
from peft_serve.commands.link import events, reaching, refusal_of, refuse


@dataclass(slots=True, kw_only=True)
class Answer:
    """What one adapter says to a prompt. Times are in seconds on `clock`, since the request was sent."""

    adapter: str
    text: str = ""
    num_tokens: int = 0
    first_s: float | None = None
    last_s: float | None = None
    is_over: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] | None = None  # which version of which adapter
    failure: CommandFailed | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Of the tokens behind the first."""
        if self.first_s is None or self.last_s is None or self.num_tokens < 2 or self.last_s <= self.first_s:
            return None
        return (self.num_tokens - 1) / (self.last_s - self.first_s)

    @property
    def figures(self) -> str:
        """A line about the speed of it."""
        if self.failure is not None:
            return self.failure.code
        parts = [f"{self.num_tokens} tokens"]
        if self.first_s is not None:
            parts.append(f"first after {self.first_s * 1000:.0f} ms")
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:.1f} tokens/s")
        reason = self.details.get("finish_reason")
        return ", ".join([*parts, *([str(reason)] if reason else [])])

    @property
    def brief(self) -> str:
        """The same in less room."""
        if self.failure is not None:
            return self.failure.code
        first = "" if self.first_s is None else f" · {self.first_s * 1000:.0f} ms"
        rate = "" if self.tokens_per_s is None else f" · {self.tokens_per_s:.1f}/s"
        return f"{self.num_tokens} tokens{first}{rate}"

    def told(self) -> dict[str, Any]:
        """The answer for a program."""
        if self.failure is not None:
            error = {"code": self.failure.code, "message": self.failure.message, "status": self.failure.status}
            return {"adapter": self.adapter, "error": error}
        first = None if self.first_s is None else round(self.first_s * 1000, 1)
        return {
            "adapter": self.adapter,
            "generated_text": self.text,
            "served_by": self.facts,
            "time_to_first_token_ms": first,
            "total_ms": None if self.last_s is None else round(self.last_s * 1000, 1),
            "tokens_per_s": None if self.tokens_per_s is None else round(self.tokens_per_s, 2),
            "details": dict(self.details),
        }

    def take_whole(self, content: Mapping[str, Any], now_s: float) -> None:
        """The body of a whole answer."""
        self.last_s = now_s
        self.text = content["generated_text"]
        self.details = content.get("details") or {}
        self.num_tokens = int(self.details.get("generated_tokens", 0))
        self.facts = content.get("adapter")

    def take(self, event: Mapping[str, Any], now_s: float) -> None:
        """One event of TGI's stream; the last brings the whole text."""
        if "error" in event:
            raise refusal_of(int(event.get("status") or 500), event)
        token = event["token"]
        self.first_s = now_s if self.first_s is None else self.first_s
        self.last_s = now_s
        self.num_tokens += 1
        if not token["special"]:
            self.text += token["text"]
        if event.get("generated_text") is not None:
            self.text = event["generated_text"]
            self.details = event.get("details") or {}
            self.num_tokens = int(self.details.get("generated_tokens", self.num_tokens))
            self.facts = event.get("adapter")


def is_told_whole(parameters: Mapping[str, Any]) -> bool:
    """Whether the answer is known at its end only: the best of several, of beams or of draws."""
    counts = (parameters.get(name) for name in ("num_beams", "best_of", "n"))
    return any(isinstance(count, int) and count > 1 for count in counts) or bool(
        parameters.get("decoder_input_details")
    )


async def stream(
    client: httpx.AsyncClient, url: str, answer: Answer, text: str, parameters: Mapping[str, Any],
    changed: Callable[[], None], clock: Callable[[], float] = time.perf_counter,
) -> None:  # fmt: skip
    """Ask for `answer` and fill it as it comes, calling `changed` each time; a refusal becomes its `failure`.

    What cannot be streamed comes in one piece.
    """
    body = {"inputs": text, "parameters": {**parameters, "details": True}}
    began = clock()
    try:
        with reaching(url):
            query = {"adapter": answer.adapter}
            path = "/generate" if is_told_whole(parameters) else "/generate_stream"
            async with client.stream("POST", path, params=query, json=body) as reply:
                if reply.status_code >= 400:
                    refuse(reply, await reply.aread())
                if path == "/generate":
                    answer.take_whole(json.loads(await reply.aread()), clock() - began)
                else:
                    async for event in events(reply.aiter_lines()):
                        answer.take(event, clock() - began)
                        changed()
    except CommandFailed as failure:
        answer.failure = failure
    answer.is_over = True
    changed()
