"""A trace: who asks for what, and when. Frozen, made from one seed, kept as JSON, so that a run can be replayed.

Arrivals, adapters, lengths and words are drawn from separate streams of the seed: two traces that differ only in
their popularity or number of adapters have the same arrivals, lengths and prompts, and their ratio is fair.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loadtest.arrivals import arrival_times
from loadtest.lengths import Lengths
from loadtest.popularity import parse_popularity
from loadtest.prompts import synthetic_text, words
from loadtest.trace_file import read_payload, read_requests

BASE = ""
"""The adapter name that stands for the bare base model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request: `arrival_s` counts from the start of the run, `adapter` is "" for the base."""

    index: int
    arrival_s: float
    adapter: str
    text: str
    prompt_tokens: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSpec:
    """What a trace is made from. Exactly one of `duration_s` and `num_requests` is set: with `num_requests` there
    are no arrival times (all zero), for closed loops. No adapters means base-only traffic."""

    adapters: tuple[str, ...]
    lengths: Lengths
    popularity: str = "slora:1"
    rate_per_s: float = 1.0
    cv: float = 1.0
    duration_s: float | None = None
    num_requests: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The requests in order of arrival, and in words what they were made from."""

    requests: tuple[TraceRequest, ...]
    made_from: dict[str, object] = field(default_factory=dict)

    @property
    def adapters(self) -> list[str]:
        """The names asked for, base left out, sorted."""
        return sorted({request.adapter for request in self.requests} - {BASE})

    @property
    def answer_tokens(self) -> int:
        """Tokens asked for in all."""
        return sum(request.max_new_tokens for request in self.requests)

    def save(self, path: Path) -> None:
        """Write the trace as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        payload = {"made_from": self.made_from, "requests": [asdict(request) for request in self.requests]}
        path.write_text(json.dumps(payload))

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """Read a trace written by `save`; ValueError if the file holds none."""
        try:
            payload = read_payload(path)
            requests = read_requests(payload, TraceRequest)
        except ValueError as problem:
            told = f"{path} is not a trace ({problem}); make one with `python -m loadtest trace`"
            raise ValueError(told) from None
        return cls(requests=requests, made_from=dict(payload.get("made_from") or {}))

    def at_once(self) -> "Trace":
        """The same requests, all there from the start (a backlog)."""
        return Trace(
            requests=tuple(replace(request, arrival_s=0.0) for request in self.requests),
            made_from={**self.made_from, "at_once": True},
        )


def build_trace(spec: TraceSpec) -> Trace:
    """The trace of a spec; the same spec always gives the same trace."""
    if (spec.duration_s is None) == (spec.num_requests is None):
        raise ValueError("a trace takes either duration_s or num_requests")
    arrivals_rng, popularity_rng, lengths_rng, words_rng = (
        np.random.default_rng(stream) for stream in np.random.SeedSequence(spec.seed).spawn(4)
    )
    if spec.duration_s is not None:
        times = arrival_times(rate_per_s=spec.rate_per_s, cv=spec.cv, duration_s=spec.duration_s, rng=arrivals_rng)
    else:
        times = np.zeros(spec.num_requests or 0)
    names = _names(spec, times, popularity_rng)
    prompts, answers = spec.lengths.draw(len(times), lengths_rng)
    vocabulary = words()
    requests = tuple(
        TraceRequest(
            index=index,
            arrival_s=float(times[index]),
            adapter=names[index],
            text=synthetic_text(int(prompts[index]), words_rng, vocabulary),
            prompt_tokens=int(prompts[index]),
            max_new_tokens=int(answers[index]),
        )
        for index in range(len(times))
    )
    return Trace(requests=requests, made_from={**asdict(spec), "adapters": len(spec.adapters)})


def _names(spec: TraceSpec, times: NDArray[np.float64], rng: np.random.Generator) -> Sequence[str]:
    if not spec.adapters:
        return [BASE] * len(times)
    chosen = parse_popularity(spec.popularity).choose(times, len(spec.adapters), rng)
    return [spec.adapters[number] for number in chosen]
