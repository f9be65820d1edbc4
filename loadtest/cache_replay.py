"""cache-replay: what hit rates would other eviction policies and sizes have had on a server's own traffic?

Plays the lookups of one tier, as ``peft-serve serve --cache-trace FILE`` wrote them down, against the very policy
classes of the server and against one that knows the future, without a server and without a clock. A lookup that
misses loads the adapter; one that fits at all is then kept, and others leave for it. Leases, pins and the number of
slots are left out.
"""

import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf, nan
from pathlib import Path
from typing import Any, Final

from loadtest.measure import mean, ratio
from loadtest.plots import Plot
from loadtest.report import Cell, Report
from peft_serve.adapters.eviction import CostAware, EvictionPolicy, LeastRecentlyUsed, Ranking
from peft_serve.adapters.load_costs import LoadCosts
from peft_serve.core import AdapterId

TIERS: Final = ("device", "host")
_MIB: Final = 2**20
_MOST: Final = 1e18  # beyond any bytes or seconds of one adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Accesses:
    """The lookups of one tier in their order. `load_s` is the mean of an adapter's measured loads, and for those that
    were not loaded while the trace was written what their bytes take at the speed of the others (0 without any)."""

    sequence: tuple[AdapterId, ...]
    sizes: dict[AdapterId, int]  # bytes, of each adapter
    load_s: dict[AdapterId, float]  # of each adapter
    num_measured: int = 0  # adapters whose loads were measured
    num_left_out: int = 0  # lookups of adapters whose size is nowhere in the trace: they never loaded

    @property
    def num_bytes(self) -> int:
        """Bytes of all adapters that are looked up, each once."""
        return sum(self.sizes[adapter] for adapter in set(self.sequence))


@dataclass(slots=True)
class Tally:
    """What came of a replay."""

    num_hits: int = 0
    num_misses: int = 0
    hit_bytes: int = 0
    missed_bytes: int = 0
    reload_s: float = 0.0
    evicted: list[AdapterId] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        """Share of the lookups that hit."""
        return ratio(self.num_hits, self.num_hits + self.num_misses)

    @property
    def byte_hit_rate(self) -> float:
        """Share of the bytes asked for that were there."""
        return ratio(self.hit_bytes, self.hit_bytes + self.missed_bytes)


class FarthestNextUse:
    """Belady's rule (IBM Systems Journal 1966): who is needed again last, or never, leaves first.

    For adapters of one size no policy hits more often. For sizes that differ the best choice is NP-hard, and this is
    neither the optimum nor a bound. To be told of every lookup of `sequence`, in its order.
    """

    def __init__(self, sequence: Sequence[AdapterId]) -> None:
        self._uses: defaultdict[AdapterId, deque[int]] = defaultdict(deque)
        for place, adapter in enumerate(sequence):
            self._uses[adapter].append(place)
        self._ranking = Ranking()

    def enter(self, adapter: AdapterId, num_bytes: int) -> None:  # noqa: ARG002  # the shape of all
        """See `EvictionPolicy`."""
        self.use(adapter)

    def use(self, adapter: AdapterId) -> None:
        """See `EvictionPolicy`."""
        ahead = self._uses[adapter]
        ahead.popleft()
        self._ranking.put(adapter, -ahead[0] if ahead else -inf)

    def rest(self, adapter: AdapterId) -> None:
        """See `EvictionPolicy`: changes nothing, for what is next stays next."""

    def leave(self, adapter: AdapterId, *, is_evicted: bool) -> None:  # noqa: ARG002  # the shape of all
        """See `EvictionPolicy`."""
        self._ranking.remove(adapter)

    def victims(self) -> Iterator[AdapterId]:
        """See `EvictionPolicy`."""
        return iter(self._ranking)


MakePolicy = Callable[[Accesses, LoadCosts], EvictionPolicy]

POLICIES: Final[dict[str, MakePolicy]] = {
    "lru": lambda _accesses, _costs: LeastRecentlyUsed(),
    "cost": lambda _accesses, costs: CostAware(costs.seconds),
    "belady": lambda accesses, _costs: FarthestNextUse(accesses.sequence),
}


def load_accesses(path: Path, tier: str) -> Accesses:
    """Read the lookups of `tier` (one of `TIERS`) from a server's cache trace. ValueError if it is none or has none."""
    with path.open("rb") as lines:
        accesses = _read(lines, tier, path)
    if not accesses.sequence:
        raise ValueError(f"{path} has no lookup of an adapter of known size in the tier {tier}")
    return accesses


def _read(lines: Iterable[bytes], tier: str, path: Path) -> Accesses:
    asked: list[AdapterId] = []
    sizes: dict[AdapterId, int] = {}
    loads: defaultdict[AdapterId, list[float]] = defaultdict(list)
    for number, line in enumerate(lines, start=1):
        try:
            asked_tier, adapter, num_bytes, load_s = _line(line)
        except ValueError as problem:
            told = f"{path}, line {number}: not a line that `peft-serve serve --cache-trace` writes ({problem})"
            raise ValueError(told) from None
        if num_bytes is not None:
            sizes[adapter] = num_bytes
            if load_s is not None:
                loads[adapter].append(load_s)
        if asked_tier == tier:
            asked.append(adapter)
    known = tuple(adapter for adapter in asked if adapter in sizes)
    return Accesses(
        sequence=known,
        sizes=sizes,
        load_s=_load_seconds(sizes, {adapter: mean(seconds) for adapter, seconds in loads.items()}),
        num_measured=len(loads),
        num_left_out=len(asked) - len(known),
    )


def _line(line: bytes) -> tuple[str, AdapterId, int | None, float | None]:
    """Tier, adapter, bytes and load seconds of a lookup; ValueError, in words, if the line is none."""
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except (json.JSONDecodeError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(fields, dict):
        raise ValueError("no JSON object")
    for name in ("tier", "adapter", "bytes", "load_s"):
        if name not in fields:
            raise ValueError(f"it lacks {name!r}")
    tier, adapter, num_bytes, load_s = (fields[name] for name in ("tier", "adapter", "bytes", "load_s"))
    for name, text in (("tier", tier), ("adapter", adapter)):
        if not isinstance(text, str):
            raise ValueError(f"{name} is {text!r}, not a text")
    if num_bytes is not None and not (isinstance(num_bytes, int) and _is_amount(num_bytes)):
        raise ValueError(f"bytes is {num_bytes!r}, not a whole number of bytes or null")
    if load_s is not None and not _is_amount(load_s):
        raise ValueError(f"load_s is {load_s!r}, not a number of seconds or null")
    return tier, AdapterId(adapter), num_bytes, None if load_s is None else float(load_s)


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MOST


def _load_seconds(sizes: dict[AdapterId, int], measured: dict[AdapterId, float]) -> dict[AdapterId, float]:
    """The seconds of every adapter, of those not measured by their bytes."""
    num_bytes = sum(sizes[adapter] for adapter in measured)
    per_byte = sum(measured.values()) / num_bytes if num_bytes else 0.0
    return {adapter: measured.get(adapter, per_byte * size) for adapter, size in sizes.items()}


def parse_sizes(text: str, whole: int) -> list[tuple[str, int]]:
    """Sizes such as ``10%,25%,1048576``, as written and in bytes; a percentage is of `whole`."""
    sizes: list[tuple[str, int]] = []
    for part in text.replace(" ", "").split(","):
        number = part.removesuffix("%")
        if not number.isdecimal() or int(number) == 0:
            raise ValueError(f"--bytes {text}: {part!r} is no size; write for instance 10%,25%,1073741824")
        sizes.append((part, whole * int(number) // 100 if part.endswith("%") else int(number)))
    return sizes


def simulate(accesses: Accesses, make_policy: MakePolicy, max_bytes: int) -> Tally:
    """Play every lookup on an empty tier of `max_bytes`."""
    costs = LoadCosts()
    policy = make_policy(accesses, costs)
    tally, inside, num_bytes = Tally(), set[AdapterId](), 0
    for adapter in accesses.sequence:
        size = accesses.sizes[adapter]
        if adapter in inside:
            tally.num_hits += 1
            tally.hit_bytes += size
            policy.use(adapter)
            continue
        seconds = accesses.load_s[adapter]
        tally.num_misses += 1
        tally.missed_bytes += size
        tally.reload_s += seconds
        costs.measure(adapter, num_bytes=size, seconds=seconds)
        if size > max_bytes:
            continue
        for victim in _victims(policy, accesses.sizes, num_bytes + size - max_bytes):
            policy.leave(victim, is_evicted=True)
            inside.remove(victim)
            tally.evicted.append(victim)
            num_bytes -= accesses.sizes[victim]
        policy.enter(adapter, size)
        inside.add(adapter)
        num_bytes += size
    return tally


def _victims(policy: EvictionPolicy, sizes: dict[AdapterId, int], excess: int) -> list[AdapterId]:
    chosen: list[AdapterId] = []
    for adapter in policy.victims():
        if excess <= 0:
            break
        chosen.append(adapter)
        excess -= sizes[adapter]
    return chosen


def run(path: Path, *, sizes: str, tier: str) -> Report:
    """Every policy at every size."""
    accesses = load_accesses(path, tier)
    found = [
        (label, max_bytes, {name: simulate(accesses, make, max_bytes) for name, make in POLICIES.items()})
        for label, max_bytes in parse_sizes(sizes, accesses.num_bytes)
    ]
    return report(accesses, found, tier=tier)


def report(accesses: Accesses, found: Sequence[tuple[str, int, dict[str, Tally]]], *, tier: str) -> Report:
    """Hits, bytes and seconds by size and policy."""
    rows: list[tuple[Cell, ...]] = []
    for label, max_bytes, tallies in found:
        for name, tally in tallies.items():
            over = ratio(tally.reload_s, tallies["lru"].reload_s) if tallies["lru"].reload_s else nan
            rates = (tally.hit_rate, tally.byte_hit_rate)
            rows.append((label, max_bytes / _MIB, name, *rates, len(tally.evicted), tally.reload_s, over))
    rates_by_policy = {
        name: tuple((max_bytes / _MIB, tallies[name].hit_rate) for _, max_bytes, tallies in found) for name in POLICIES
    }
    return Report(
        name="cache-replay",
        title=f"cache-replay: {len(accesses.sequence)} lookups of the tier {tier}, by size and policy",
        columns=("size", "MiB", "policy", "hit rate", "byte-hit rate", "evictions", "reload s", "reload over lru"),
        rows=tuple(rows),
        notes=_notes(accesses),
        plot=Plot(
            title=f"Hit rate of the tier {tier}",
            x_label="size, MiB",
            y_label="hit rate",
            series={name: points for name, points in rates_by_policy.items() if name != "belady"},
            bounds={"belady": rates_by_policy["belady"]},
        ),
        settings={"tier": tier, "num_left_out": accesses.num_left_out},
    )


def _notes(accesses: Accesses) -> tuple[str, ...]:
    distinct = set(accesses.sequence)
    num_sizes = len({accesses.sizes[adapter] for adapter in distinct})
    one_size = "all of one size: no policy can hit more often"
    many_sizes = f"of {num_sizes} sizes: here neither an optimum nor a bound"
    return (
        f"{len(distinct)} adapters of {accesses.num_bytes / _MIB:.4g} MiB; their first lookups miss with any policy, "
        f"so the hit rate is at most {1 - ratio(len(distinct), len(accesses.sequence)):.4g}",
        f"belady evicts whoever is needed again last, with knowledge of the future; the adapters are "
        f"{one_size if num_sizes == 1 else many_sizes}",
        f"load seconds: measured for {accesses.num_measured} adapters, of others by their bytes",
        f"lookups left out, of adapters that never loaded: {accesses.num_left_out}",
    )
