"""Rates over the last seconds, from counts that only grow.

Owns a window of readings. Knows no engine and no clock: a reading brings its time along.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

SHORT_S: Final = 2.0
LONG_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What was counted since the start, at a moment in seconds."""

    time_s: float
    drawn_tokens: float = 0
    prompt_tokens: float = 0
    requests: float = 0
    steps: float = 0
    step_s: float = 0
    looked_up: float = 0
    cached: float = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Over `SHORT_S`; the share of cached prompt tokens over `LONG_S`."""

    tokens_per_s: float
    prompt_tokens_per_s: float
    requests_per_s: float
    step_ms: float | None  # mean; None: no step was made
    cached_share: float | None  # 0 to 1; None: no prompt came


class RateWindow:
    """Give it a reading a few times a second."""

    def __init__(self) -> None:
        self._readings: deque[Counts] = deque()

    def add(self, now: Counts) -> Rates:
        """The rates at this reading; those of the first one are 0."""
        while self._readings and self._readings[0].time_s < now.time_s - LONG_S:
            self._readings.popleft()
        self._readings.append(now)
        longest = self._readings[0]
        start = next((r for r in reversed(self._readings) if r.time_s <= now.time_s - SHORT_S), longest)
        seconds = now.time_s - start.time_s
        num_steps, looked_up = now.steps - start.steps, now.looked_up - longest.looked_up
        return Rates(
            tokens_per_s=_per_s(now.drawn_tokens - start.drawn_tokens, seconds),
            prompt_tokens_per_s=_per_s(now.prompt_tokens - start.prompt_tokens, seconds),
            requests_per_s=_per_s(now.requests - start.requests, seconds),
            step_ms=1000 * (now.step_s - start.step_s) / num_steps if num_steps else None,
            cached_share=(now.cached - longest.cached) / looked_up if looked_up else None,
        )


def _per_s(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
