"""The traffic of a simulation: requests as columns, drawn by the rules that traces are drawn by."""

from dataclasses import dataclass

import numpy as np

from loadtest.arrivals import arrival_times
from loadtest.lengths import Lengths
from loadtest.popularity import Floats, Ints, parse_popularity

BASE_NUMBER = -1
"""The adapter number of the base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Requests in the order they come; `adapters` are numbers, `BASE_NUMBER` for the base."""

    times_s: Floats
    adapters: Ints
    prompts: Ints  # tokens
    answers: Ints  # tokens

    def __len__(self) -> int:
        return len(self.times_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficSpec:
    """What to draw: an open loop of `rate_per_s` over `num_adapters`, 0 for the base alone."""

    rate_per_s: float
    duration_s: float
    num_adapters: int
    popularity: str
    lengths: Lengths
    cv: float = 1.0
    seed: int = 0

    def draw(self) -> Traffic:
        """The same for the same spec."""
        rng = np.random.default_rng(self.seed)
        times_s = arrival_times(rate_per_s=self.rate_per_s, cv=self.cv, duration_s=self.duration_s, rng=rng)
        prompts, answers = self.lengths.draw(len(times_s), rng)
        if self.num_adapters:
            adapters = parse_popularity(self.popularity).choose(times_s, self.num_adapters, rng)
        else:
            adapters = np.full(len(times_s), BASE_NUMBER)
        return Traffic(times_s=times_s, adapters=adapters, prompts=prompts, answers=answers)
