"""Variety in a batch, and load: Punica's closed loop by popularity (W4), and requests that come when they come (W2).

The real scheduler, as in `many_bench`: unlike steps by themselves (`popularity_bench`), its prompts, its copies and its
planning are in the time. Rates are told as shares of what the closed loop of the base alone came to, so that however
many adapters there are is asked the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import mean, median
from typing import Final, TypeVar

import numpy as np

from loadtest.gpu.ground import Ground
from loadtest.gpu.many_bench import LENGTHS, RANK, asked, host_cache
from loadtest.gpu.popularity_bench import POPULARITIES, slots_of
from loadtest.gpu.results import Figures, Found, Value
from loadtest.gpu.serving import Serving
from loadtest.gpu.shapes import decoder
from loadtest.gpu.traffic import ClosedLoop, Lengths, Loop, OpenLoop, Served, Waited, forever, serving_for
from peft_serve.adapters.primitives import Adapter
from peft_serve.model.base import ResidentBase

LOADS: Final = (1.2, 0.9, 0.5)
COUNTS: Final = (0, 200, 2000)  # adapters that requests ask for
NUM_ROWS: Final = 32
NUM_SLOTS: Final = 64
LATE: Final = 5.0  # times the first token of a request alone, as W2 counts it
_Kind = TypeVar("_Kind", bound=Loop)
_BASE: Final = "base alone"
_ALONE: Final = 9


@dataclass(frozen=True, slots=True)
class _Stand:
    """A base, adapters in the host's memory, and the sizes of loops over them."""

    ground: Ground
    served: Serving
    adapters: list[Adapter]
    num_rows: int
    lengths: Lengths

    @property
    def base(self) -> ResidentBase:
        """Which of them runs."""
        return self.served.base

    def loop(self, kind: type[_Kind], *, num_rows: int, num_slots: int) -> _Kind:
        """A loop of a kind."""
        return kind(self.ground, self.served, num_rows=num_rows, num_slots=num_slots, lengths=self.lengths)

    def replayed(self, found: Sequence[Served]) -> float | None:
        """The share of their steps that was replayed; None where nothing can be."""
        steps = max(1, sum(one.num_steps for one in found))
        return sum(one.num_replayed for one in found) / steps if self.served.has_graphs else None


def load(ground: Ground) -> Found:
    """Two tables."""
    quick = ground.is_quick
    counts = (0, 6) if quick else COUNTS
    base = ground.bases.get(decoder(is_quick=quick))
    adapters = host_cache(base, max(counts), rank=4 if quick else RANK)
    by_id = {adapter.id: adapter for adapter in adapters}
    num_rows, lengths = (4, Lengths(prompt=6, answer=8)) if quick else (NUM_ROWS, LENGTHS)
    served = serving_for(ground, base, by_id.__getitem__, num_rows=num_rows, lengths=lengths)
    stand = _Stand(ground, served, adapters, num_rows, lengths)
    num_loops = 2 * (len(POPULARITIES) + 1) + len(counts) * len(LOADS)
    each_s = 0.0 if quick else max(1.0, (ground.left_s - 3) / num_loops)
    variety = _variety(stand, each_s)
    figures, left_out = _load_table(stand, variety[_BASE], counts, each_s)
    return Found(figures=(_variety_table(stand, variety), figures), left_out=left_out)


def _variety(stand: _Stand, each_s: float) -> dict[str, list[Served]]:
    """Loops of every popularity and of the base alone, there and back."""
    names = (_BASE, *POPULARITIES)
    found: dict[str, list[Served]] = {name: [] for name in names}
    ids = [adapter.id for adapter in stand.adapters]
    for name in (*names, *reversed(names)):
        loop = stand.loop(ClosedLoop, num_rows=stand.num_rows, num_slots=stand.num_rows)
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
            stand.replayed(found[name]),
        )
        for name, speed in speeds.items()
    )
    return Figures(
        title=f"Variety in a batch: {stand.num_rows} requests at once, {stand.base.name}",
        columns=("popularity", "tokens/s", "over identical", "over base", "installs a step", "replayed"),
        rows=rows,
        notes=(
            f"closed loop, an adapter of rank {RANK} at attention for each request at most, all resident",
            stand.served.how,
        ),
    )


def _load_table(
    stand: _Stand, base: list[Served], counts: tuple[int, ...], each_s: float
) -> tuple[Figures, tuple[str, ...]]:
    """The table, and what there was no time for."""
    capacity = mean([one.tokens_per_s for one in base]) / stand.lengths.answer
    alone_s = _alone_s(stand)
    rows: list[tuple[Value, ...]] = []
    own: dict[float, float] = {}  # the base's tokens a second, by rho
    left_out: tuple[str, ...] = ()
    for rho, n in product(LOADS, counts):
        if rows and stand.ground.left_s < each_s:
            left_out = (f"rho {rho:g} with {n} adapters, and what is behind it: no time was left",)
            break
        found = _loaded(stand, n, rho * capacity, each_s)
        own.setdefault(rho, found.served.tokens_per_s)
        late = [at for at in found.first_s if at > LATE * alone_s]
        in_time = 1 - len(late) / len(found.first_s) if found.first_s else None
        speed, times = found.served.tokens_per_s, (_milli(_share(found, 50)), _milli(_share(found, 99)), in_time)
        told = (rho, n, rho * capacity, speed, speed / own[rho] if own[rho] else None, len(found.first_s))
        rows.append((*told, *times, stand.replayed([found.served])))
    figures = Figures(
        title=f"Load: requests for n adapters, {stand.base.name}",
        columns=(
            *("rho", "adapters", "requests/s", "tokens/s", "thr(n)/thr(0)", "first tokens", "p50 ms", "p99 ms"),
            *(f"within {LATE:g} T0", "replayed"),
        ),
        rows=tuple(rows),
        notes=(
            f"Poisson arrivals, slora:0.3; rho 1 is the closed loop of the base alone; T0, the first token of a "
            f"request alone: {1e3 * alone_s:.3g} ms",
        ),
    )
    return figures, left_out


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


def _loaded(stand: _Stand, n: int, per_s: float, each_s: float) -> Waited:
    """An open loop over the first n adapters."""
    quick, ids = stand.ground.is_quick, [adapter.id for adapter in stand.adapters[:n]]
    num_slots = max(1, min(NUM_SLOTS, n))
    loop = stand.loop(OpenLoop, num_rows=stand.num_rows, num_slots=num_slots)
    found = loop.run(
        forever(ids, asked(len(ids))),
        per_s=per_s,
        most_s=60.0 if quick else each_s,
        most_requests=3 if quick else 4096,
    )
    loop.close()
    return found


def _share(found: Waited, percent: int) -> float | None:
    return float(np.percentile(found.first_s, percent)) if found.first_s else None


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
