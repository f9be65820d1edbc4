"""Popularity: which adapter each request of a trace asks for.

A popularity is named by a short text such as ``zipf:1`` (see `parse_popularity`) and answers with adapter
numbers ``0 .. num_adapters - 1``. It knows nothing of names, lengths or HTTP.

Sources: S-LoRA (arXiv 2311.03285, power-law traces) for `Slora`; Punica (arXiv 2310.18547, section 7) for
`Distinct`, `Uniform`, `Skewed` and `Identical`.
"""

from dataclasses import dataclass
from math import ceil, isfinite, isqrt
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Popularity(Protocol):
    """A rule that gives every arrival an adapter number."""

    def choose(self, arrivals_s: Floats, num_adapters: int, rng: np.random.Generator) -> Ints:
        """Adapter numbers, one for each arrival time (seconds from the start, ascending)."""
        ...


def _by_weight(weights: Floats, count: int, rng: np.random.Generator) -> Ints:
    return rng.choice(len(weights), size=count, p=weights / weights.sum()).astype(np.int64)


def zipf_weights(num_adapters: int, exponent: float) -> Floats:
    """Weights 1 / rank^exponent, the most popular first."""
    return np.arange(1, num_adapters + 1, dtype=np.float64) ** -exponent


@dataclass(frozen=True, slots=True)
class Slora:
    """i = floor(n U^(1/alpha)) with U uniform: alpha 1 spreads evenly, a small alpha favours the first few."""

    alpha: float

    def choose(self, arrivals_s: Floats, num_adapters: int, rng: np.random.Generator) -> Ints:
        """See `Popularity.choose`."""
        drawn = np.floor(num_adapters * rng.random(len(arrivals_s)) ** (1.0 / self.alpha))
        return np.minimum(drawn, num_adapters - 1).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Zipf:
    """The adapter of rank k is asked for in proportion to 1 / k^exponent."""

    exponent: float

    def choose(self, arrivals_s: Floats, num_adapters: int, rng: np.random.Generator) -> Ints:
        """See `Popularity.choose`."""
        return _by_weight(zipf_weights(num_adapters, self.exponent), len(arrivals_s), rng)


@dataclass(frozen=True, slots=True)
class Distinct:
    """Round robin: any `num_adapters` requests in a row ask for different adapters."""

    def choose(self, arrivals_s: Floats, num_adapters: int, rng: np.random.Generator) -> Ints:  # noqa: ARG002  # the shape of all
        """See `Popularity.choose`."""
        return np.arange(len(arrivals_s), dtype=np.int64) % num_adapters


@dataclass(frozen=True, slots=True)
class Uniform:
    """The first ceil(sqrt(n)) adapters, evenly."""

    def choose(self, arrivals_s: Floats, num_adapters: int, rng: np.random.Generator) -> Ints:
        """See `Popularity.choose`."""
        num_used = 1 + isqrt(num_adapters - 1)
        return rng.integers(num_used, size=len(arrivals_s), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Skewed:
    """Each adapter is asked for `ratio` times as often as the next."""

    ratio: float = 1.5

    def choose(self, arrivals_s: Floats, num_adapters: int, rng: np.random.Generator) -> Ints:
        """See `Popularity.choose`."""
        weights = self.ratio ** -np.arange(num_adapters, dtype=np.float64)
        return _by_weight(weights, len(arrivals_s), rng)


@dataclass(frozen=True, slots=True)
class Identical:
    """Everybody asks for adapter 0."""

    def choose(self, arrivals_s: Floats, num_adapters: int, rng: np.random.Generator) -> Ints:  # noqa: ARG002  # the shape of all
        """See `Popularity.choose`."""
        return np.zeros(len(arrivals_s), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Drift:
    """Zipf(1) whose ranking turns by an eighth of the adapters every `period_s` seconds: caches must follow."""

    period_s: float = 20.0

    def choose(self, arrivals_s: Floats, num_adapters: int, rng: np.random.Generator) -> Ints:
        """See `Popularity.choose`."""
        ranks = _by_weight(zipf_weights(num_adapters, 1.0), len(arrivals_s), rng)
        turns = np.floor(arrivals_s / self.period_s).astype(np.int64)
        return (ranks + turns * ceil(num_adapters / 8)) % num_adapters


def parse_popularity(text: str) -> Popularity:
    """The popularity named by ``slora:ALPHA``, ``zipf:S``, ``drift[:PERIOD_S]``, ``distinct``, ``uniform``,
    ``skewed[:RATIO]`` or ``identical``; ValueError for anything else. S may be zero, ALPHA, PERIOD_S and RATIO not."""
    name, _, parameter = text.partition(":")
    match name:
        case "slora":
            return Slora(_number(text, parameter or "1"))
        case "zipf":
            return Zipf(_number(text, parameter or "1", may_be_zero=True))
        case "drift":
            return Drift(_number(text, parameter)) if parameter else Drift()
        case "skewed":
            return Skewed(_number(text, parameter)) if parameter else Skewed()
    alone: dict[str, Popularity] = {"distinct": Distinct(), "uniform": Uniform(), "identical": Identical()}
    if text in alone:
        return alone[text]
    if name in alone:
        raise ValueError(f"popularity {text!r}: {name} takes no number; write {name}")
    raise ValueError(f"popularity {text!r} is not known; write for instance zipf:1, slora:0.3, uniform or drift")


def _number(text: str, parameter: str, *, may_be_zero: bool = False) -> float:
    least = "from zero on" if may_be_zero else "above zero"
    try:
        number = float(parameter)
    except ValueError:
        raise ValueError(f"popularity {text!r}: {parameter!r} is no number; it takes one {least}") from None
    if not isfinite(number) or number < 0 or (number == 0 and not may_be_zero):
        raise ValueError(f"popularity {text!r}: it takes a number {least}")
    return number
