"""How long a step takes: a + b tokens + c sum of ranks + d KV positions, fitted while the server runs.

Recursive least squares with forgetting. A step that took many times what was predicted (a page fault, a collection,
a busy machine) moves the fit no more than an ordinary one. Times in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_SCALES: Final = (1.0, 16.0, 64.0, 1024.0)  # so that the four columns are of one size
_NUM: Final = len(_SCALES)
_MEMORY: Final = 0.998  # what a step counts after another one: half of it after 350
_PRIOR: Final = 100.0
_CLIP: Final = 4.0  # mean deviations that one step may be off by


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """What a step was to compute."""

    num_tokens: int
    sum_rank: int  # over distinct adapters
    num_positions: int  # KV positions that its rows read


class StepTimeModel:
    """The four coefficients, and what they predict."""

    def __init__(self) -> None:
        self._theta = [0.0] * _NUM
        self._covariance = [[_PRIOR if i == j else 0.0 for j in range(_NUM)] for i in range(_NUM)]
        self._deviation = 0.0
        self.num_steps = 0

    @property
    def coefficients(self) -> dict[str, float]:
        """Seconds for a step, and for each token, rank and position of it; 0 where too few steps tell them apart."""
        names = ("step", "token", "rank", "position")
        return {name: max(0.0, theta) / scale for name, theta, scale in zip(names, self._theta, _SCALES, strict=True)}

    def predict(self, load: StepLoad) -> float:
        """Seconds; 0 before the first step has been seen."""
        return max(0.0, _dot(self._theta, _columns(load)))

    def observe(self, load: StepLoad, seconds: float) -> None:
        """A step has run."""
        x = _columns(load)
        error = seconds - _dot(self._theta, x)
        if self.num_steps >= 2 * _NUM:
            bound = _CLIP * self._deviation
            error = min(max(error, -bound), bound)
        weight = max(1.0 / (self.num_steps + 1), 0.05)
        self._deviation += weight * (abs(error) - self._deviation)
        self._fit(x, error)
        self.num_steps += 1

    def _fit(self, x: list[float], error: float) -> None:
        projected = [_dot(row, x) for row in self._covariance]
        gain = [value / (_MEMORY + _dot(projected, x)) for value in projected]
        for i in range(_NUM):
            self._theta[i] += gain[i] * error
            for j in range(_NUM):
                shrunk = (self._covariance[i][j] - gain[i] * projected[j]) / _MEMORY
                # Directions that no step shows are not to grow without end.
                self._covariance[i][j] = min(max(shrunk, -_PRIOR), _PRIOR)


def _columns(load: StepLoad) -> list[float]:
    values = (1, load.num_tokens, load.sum_rank, load.num_positions)
    return [value / scale for value, scale in zip(values, _SCALES, strict=True)]


def _dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
