"""Variety in a batch, and load: Punica's closed loop by popularity (W4), and requests that come when they come (W2).

The real scheduler, as in `many_bench`: unlike steps by themselves (`popularity_bench`), its prompts, its copies and its
planning are in the time. Rates are told as shares of what the closed loop of distinct adapters came to.
"""

from dataclasses import dataclass
from statistics import mean, median
from typing import Final

import numpy as np

from loadtest.gpu.ground import Ground
from loadtest.gpu.many_bench import LENGTHS, RANK, asked, host_cache
from loadtest.gpu.popularity_bench import POPULARITIES, slots_of
from loadtest.gpu.results import Figures, Found, Value
from loadtest.gpu.shapes import decoder
from loadtest.gpu.traffic import ClosedLoop, Lengths, Loop, OpenLoop, Served, Waited, forever
from peft_serve.adapters.primitives import Adapter
from peft_serve.model.base import ResidentBase

LOADS: Final = (0.5, 0.9, 1.2)
NUM_ROWS: Final = 32
NUM_ADAPTERS: Final = 200
NUM_SLOTS: Final = 64
LATE: Final = 5.0  # times the first token of a request alone, as W2 counts it
_BASE: Final = "base alone"
_ALONE: Final = 9


@dataclass(frozen=True, slots=True)
class _Stand:
    """A base, adapters in the host's memory, and the sizes of loops over them."""

    ground: Ground
    base: ResidentBase
    adapters: list[Adapter]
    num_rows: int
    lengths: Lengths

    def loop(self, kind: type[Loop], *, num_rows: int, num_slots: int) -> Loop:
        """A loop of a kind."""
        by_id = {adapter.id: adapter for adapter in self.adapters}
        sizes = {"num_rows": num_rows, "num_slots": num_slots, "lengths": self.lengths}
        return kind(self.ground, self.base, by_id.__getitem__, **sizes)  # type: ignore[arg-type]


def load(ground: Ground) -> Found:
    """Two tables."""
    quick = ground.is_quick
    base = ground.bases.get(decoder(is_quick=quick))
    stand = _Stand(
        ground,
        base,
        host_cache(base, 6 if quick else NUM_ADAPTERS, rank=4 if quick else RANK),
        4 if quick else NUM_ROWS,
        Lengths(prompt=6, answer=4) if quick else LENGTHS,
    )
    each_s = 0.0 if quick else max(1.0, (ground.left_s - 3) / (2 * (len(POPULARITIES) + 1) + len(LOADS)))
    variety = _variety(stand, each_s)
    return Found(figures=(_variety_table(stand, variety), _load_table(stand, variety["distinct"], each_s)))


def _variety(stand: _Stand, each_s: float) -> dict[str, list[Served]]:
    """Loops of every popularity and of the base alone, there and back."""
    names = (_BASE, *POPULARITIES)
    found: dict[str, list[Served]] = {name: [] for name in names}
    ids = [adapter.id for adapter in stand.adapters]
    for name in (*names, *reversed(names)):
        loop = stand.loop(ClosedLoop, num_rows=stand.num_rows, num_slots=stand.num_rows)
        assert isinstance(loop, ClosedLoop)
        order = [] if name == _BASE else [slot - 1 for slot in slots_of(name, stand.num_rows)]
        found[name].append(loop.run(forever(ids[: stand.num_rows] if order else [], order), most_s=each_s))
        loop.close()
    return found


def _variety_table(stand: _Stand, found: dict[str, list[Served]]) -> Figures:
    speeds = {name: mean([one.tokens_per_s for one in passes]) for name, passes in found.items()}
    rows: tuple[tuple[Value, ...], ...] = tuple(
        (
            *(name, speed, speed / speeds["identical"], speed / speeds[_BASE]),
            sum(one.num_installs for one in found[name]) / max(1, sum(one.num_steps for one in found[name])),
        )
        for name, speed in speeds.items()
    )
    return Figures(
        title=f"Variety in a batch: {stand.num_rows} requests at once, {stand.base.name}",
        columns=("popularity", "tokens/s", "over identical", "over base", "installs a step"),
        rows=rows,
        notes=(f"closed loop, an adapter of rank {RANK} at attention for each request at most, all resident",),
    )


def _load_table(stand: _Stand, distinct: list[Served], each_s: float) -> Figures:
    capacity = mean([one.tokens_per_s for one in distinct]) / stand.lengths.answer
    alone_s = _alone_s(stand)
    rows: list[tuple[Value, ...]] = []
    for rho in LOADS:
        found = _loaded(stand, rho, capacity, each_s)
        late = [at for at in found.first_s if at > LATE * alone_s]
        in_time = 1 - len(late) / len(found.first_s) if found.first_s else None
        times = (_milli(_share(found, 50)), _milli(_share(found, 99)), in_time)
        rows.append((rho, rho * capacity, found.served.tokens_per_s, len(found.first_s), *times))
    return Figures(
        title=f"Load: {len(stand.adapters)} adapters, {stand.base.name}",
        columns=("rho", "requests/s", "tokens/s", "first tokens", "p50 ms", "p99 ms", f"within {LATE:g} T0"),
        rows=tuple(rows),
        notes=(
            f"Poisson arrivals, slora:0.3; rho 1 is the closed loop of distinct adapters; T0, the first token of a "
            f"request alone: {1e3 * alone_s:.3g} ms",
        ),
    )


def _alone_s(stand: _Stand) -> float:
    """The median time to the first token of a request that nobody else shares steps with; its adapter comes with it."""
    loop, took = stand.loop(Loop, num_rows=1, num_slots=1), list[float]()
    for adapter in stand.adapters[: 2 if stand.ground.is_quick else _ALONE]:
        stand.ground.settle()
        began_s = stand.ground.clock()
        loop.submit(adapter.id, answer=stand.lengths.answer)
        while not loop.step().tokens:
            pass
        took.append(stand.ground.clock() - began_s)
        loop.end_all()
    loop.close()
    return median(took)


def _loaded(stand: _Stand, rho: float, capacity: float, each_s: float) -> Waited:
    """An open loop at a share of the capacity."""
    quick, ids = stand.ground.is_quick, [adapter.id for adapter in stand.adapters]
    num_slots = min(NUM_SLOTS, len(ids))
    loop = stand.loop(OpenLoop, num_rows=stand.num_rows, num_slots=num_slots)
    assert isinstance(loop, OpenLoop)
    found = loop.run(
        forever(ids, asked(len(ids))),
        per_s=rho * capacity,
        most_s=60.0 if quick else each_s,
        most_requests=3 if quick else 4096,
    )
    loop.close()
    return found


def _share(found: Waited, percent: int) -> float | None:
    return float(np.percentile(found.first_s, percent)) if found.first_s else None


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
