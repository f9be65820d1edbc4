"""How long things take on a device: warmed up, synchronised, in turns, with the spread beside the median."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Final

import torch

from loadtest.gpu.ground import Ground

Act = Callable[[], object]

_WARM_UPS: Final = 3
_CALLS: Final = 20  # of a kernel between two events
_MOST: Final = 200  # repeats of anything
_FILLER: Final = 8192  # side of the product that keeps a GPU busy while the host gets ahead of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Seconds: the median of `count` repeats, and the quarters between which half of them lie."""

    median_s: float
    low_s: float
    high_s: float
    count: int

    @property
    def words(self) -> str:
        """The spread, as a share of the median."""
        return f"{(self.high_s - self.low_s) / self.median_s:.1%}" if self.median_s else "-"


def spread(times_s: list[float]) -> Spread:
    """Of at least one time."""
    low, _, high = quantiles(times_s, n=4, method="inclusive") if len(times_s) > 1 else (times_s[0],) * 3
    return Spread(median_s=median(times_s), low_s=low, high_s=high, count=len(times_s))


def in_turns(ground: Ground, acts: Mapping[str, Act], *, most_s: float, fewest: int = 2) -> dict[str, Spread]:
    """The time of each act on the host's clock, the device waited for: A B B A again and again, for `most_s` or less
    if no more time is left, and `fewest` times at least."""
    for act in acts.values():
        for _ in range(1 if ground.is_quick else _WARM_UPS):
            act()
    times: dict[str, list[float]] = {name: [] for name in acts}
    until_s = ground.clock() + min(most_s, max(0.0, ground.left_s))
    names = list(acts)
    for turn in range(_MOST):
        if turn >= fewest and (ground.is_quick or ground.clock() > until_s):
            break
        for name in names if turn % 2 == 0 else reversed(names):
            times[name].append(_once_s(ground, acts[name]))
    return {name: spread(each) for name, each in times.items()}


def _once_s(ground: Ground, act: Act) -> float:
    ground.settle()
    began_s = ground.clock()
    act()
    ground.settle()
    return ground.clock() - began_s


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """A kernel's time on the device, and what launching it costs the host, each a spread over rounds of calls."""

    device: Spread
    host: Spread


def kernels_in_turns(ground: Ground, acts: Mapping[str, Act], *, most_s: float) -> dict[str, KernelTime]:
    """Many launches of each act between two events, A B B A. The device is given something to do before, so that what
    lies between the events is its own time and not the host's; on a CPU both are the same."""
    for act in acts.values():
        for _ in range(1 if ground.is_quick else _WARM_UPS):
            act()
    calls = 1 if ground.is_quick else _CALLS
    fill = filler(ground)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in acts}
    until_s = ground.clock() + min(most_s, max(0.0, ground.left_s))
    names = list(acts)
    for turn in range(_MOST):
        if turn >= 2 and (ground.is_quick or ground.clock() > until_s):
            break
        for name in names if turn % 2 == 0 else reversed(names):
            found[name].append(_round_s(ground, acts[name], calls, fill))
    return {
        name: KernelTime(device=spread([one for one, _ in each]), host=spread([one for _, one in each]))
        for name, each in found.items()
    }


def _round_s(ground: Ground, act: Act, calls: int, fill: Act) -> tuple[float, float]:
    """Seconds of a call on the device and on the host."""
    ground.settle()
    if not ground.is_gpu:
        began_s = ground.clock()
        for _ in range(calls):
            act()
        each_s = (ground.clock() - began_s) / calls
        return each_s, each_s
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    fill()
    first.record()
    began_s = ground.clock()
    for _ in range(calls):
        act()
    host_s = (ground.clock() - began_s) / calls
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / calls, host_s


def filler(ground: Ground) -> Act:
    """A few milliseconds of work for a GPU."""
    if not ground.is_gpu:
        return lambda: None
    left, out = (torch.ones(_FILLER, _FILLER, dtype=torch.bfloat16, device=ground.device) for _ in range(2))

    def fill() -> None:
        for _ in range(6):
            torch.mm(left, left, out=out)

    return fill
