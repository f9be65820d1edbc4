"""A closed loop of requests against a server: so many callers, each asking again as soon as it has its answer.

A closed loop shows what a server gives when it is kept busy; it hides what waiting costs when requests come on their
own account, which is what `python -m loadtest` measures.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from peft_serve.commands.answers import Answer, stream
from peft_serve.commands.link import authorization, timeouts

_WORDS: Final = [
    "order",
    "weather",
    "late",
    "answer",
    "river",
    "green",
    "seven",
    "paper",
    "house",
    "light",
    "window",
    "stone",
    "music",
    "bread",
    "train",
    "garden",
    "letter",
    "north",
    "quiet",
    "number",
    "summer",
    "bridge",
    "table",
    "silver",
    "morning",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked. Every prompt is a new one, so that none is found in the prefix cache by its beginning."""

    adapters: Sequence[str]  # taken in turn
    concurrency: int
    num_requests: int
    prompt_words: int
    max_new_tokens: int
    seed: int

    def prompt(self, index: int) -> str:
        source = random.Random(f"{self.seed} {index}")
        return f"{index} " + " ".join(source.choice(_WORDS) for _ in range(self.prompt_words))

    def parameters(self) -> dict[str, Any]:
        """Answers of full length, without the templates and choices of adapters: the same work for each."""
        return {"max_new_tokens": self.max_new_tokens, "ignore_eos": True, "template": None, "choices": None}


@dataclass(slots=True)
class Measured:
    """What came back, and how long all of it took."""

    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def whole(self) -> list[Answer]:
        return [each for each in self.answers if each.failure is None]

    def told(self) -> dict[str, Any]:
        """Every figure, for a program; milliseconds for latencies."""
        whole = self.whole
        failures = Counter(each.failure.code for each in self.answers if each.failure is not None)
        prompt_tokens = sum(int(each.details.get("prompt_tokens", 0)) for each in whole)
        return {
            "requests": len(self.answers),
            "failed": dict(failures),
            "seconds": round(self.seconds, 3),
            "requests_per_s": _rounded(len(whole) / self.seconds),
            "output_tokens_per_s": _rounded(sum(each.num_tokens for each in whole) / self.seconds),
            "prompt_tokens_per_s": _rounded(prompt_tokens / self.seconds),
            "ttft_ms": quantiles([1000 * each.first_s for each in whole if each.first_s is not None]),
            "tpot_ms": quantiles([1000 / each.tokens_per_s for each in whole if each.tokens_per_s]),
            "total_ms": quantiles([1000 * each.last_s for each in whole if each.last_s is not None]),
        }


def quantiles(values: Sequence[float]) -> Mapping[str, float | None]:
    """The median, the 99th percentile and the mean; None where there is nothing."""
    if not values:
        return {"p50": None, "p99": None, "mean": None}
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "p50": _rounded(statistics.median(ordered)),
        "p99": _rounded(ordered[min(last, round(0.99 * last + 0.5))]),  # of few values the largest
        "mean": _rounded(statistics.fmean(ordered)),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


async def measure(
    url: str, load: Load, done: Callable[[], None], clock: Callable[[], float] = time.perf_counter
) -> Measured:
    """Run the load once each adapter was asked once without being measured; `done` is called after every answer."""
    measured = Measured()
    limits = httpx.Limits(max_connections=load.concurrency, max_keepalive_connections=load.concurrency)
    async with httpx.AsyncClient(
        base_url=url, timeout=timeouts(), limits=limits, headers=authorization(os.environ)
    ) as client:
        for i, adapter in enumerate(load.adapters):
            warming = Answer(adapter=adapter)
            await stream(client, url, warming, load.prompt(-1 - i), load.parameters(), _nothing, clock)
            if warming.failure is not None:
                raise warming.failure
        turns = iter(range(load.num_requests))
        began = clock()
        callers = [_caller(client, url, load, turns, measured, done, clock) for _ in range(load.concurrency)]
        await asyncio.gather(*callers)
        measured.seconds = clock() - began
    return measured


async def _caller(
    client: httpx.AsyncClient, url: str, load: Load, turns: Any, measured: Measured, done: Callable[[], None],
    clock: Callable[[], float],
) -> None:  # fmt: skip
    for index in turns:
        answer = Answer(adapter=load.adapters[index % len(load.adapters)])
        measured.answers.append(answer)
        await stream(client, url, answer, load.prompt(index), load.parameters(), _nothing, clock)
        done()


def _nothing() -> None:
    return None
