"""The bound: how fast this machine could at best run a step.

A step must at least read its weights, the keys and values it attends to and the terms of its distinct adapters
once, and do its multiplications once:

    step >= max(bytes / bandwidth, flops / rate)

Bandwidth and rate are measured here, by what torch itself gets out of the machine with the same number of threads:
STREAM's copy and triad (McCalpin 1995), a sum that only reads, and large matrix products. What a step has to do is
counted in `loadtest.work`.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass

import torch

LARGEST_BYTES = 2**28
"""Arrays are no larger than this; several times any cache."""

MATRIX_SIZES = (512, 1024, 2048)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRates:
    """Bytes and floating-point operations a second, each the best of several passes.

    Copy counts two arrays and triad three, as STREAM does: what a write fetches first is not counted."""

    copy_bytes_per_s: float
    triad_bytes_per_s: float
    read_bytes_per_s: float
    flops_per_s: float

    @property
    def bytes_per_s(self) -> float:
        """The bandwidth that a bound may assume: the best of the three, and so nobody's excuse."""
        return max(self.copy_bytes_per_s, self.triad_bytes_per_s, self.read_bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step has to do at least. A multiplication with its addition counts as two flops."""

    num_bytes: float
    num_flops: float

    def __add__(self, other: "Work") -> "Work":
        """Both, one after the other."""
        return Work(num_bytes=self.num_bytes + other.num_bytes, num_flops=self.num_flops + other.num_flops)

    def bound_s(self, rates: MachineRates) -> float:
        """Seconds that no step doing this can go below on such a machine."""
        return max(self.bytes_s(rates), self.flops_s(rates))

    def bytes_s(self, rates: MachineRates) -> float:
        """Seconds of reading alone."""
        return self.num_bytes / rates.bytes_per_s

    def flops_s(self, rates: MachineRates) -> float:
        """Seconds of arithmetic alone."""
        return self.num_flops / rates.flops_per_s


class RateMeter:
    """Takes this machine's rates, with torch's threads as they are set.

    `num_bytes` is what a step reads: the arrays are of that size (and at most `LARGEST_BYTES`), so that a base that
    fits in a cache is held against the cache's bandwidth. Flops are those of large products: in `dtype`, or in float32
    where torch has no fast product of the narrower one (a CPU without its instructions: a hundredth), since a step may
    widen its weights as well.
    """

    def __init__(
        self, *, device: str, dtype: torch.dtype, num_bytes: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._device, self._clock = device, clock
        size = max(1024, min(num_bytes, LARGEST_BYTES) // dtype.itemsize)
        self._arrays = [torch.ones(size, dtype=dtype, device=device) for _ in range(3)]
        self._moved = size * dtype.itemsize
        smallest = min(MATRIX_SIZES)
        products = {kind: _product(smallest, device, kind) for kind in (dtype, torch.float32)}
        for act in products.values():
            act()  # the first one prepares
        self._kind = min(products, key=lambda kind: self._seconds(products[kind]))
        self._products = {n: _product(n, device, self._kind) for n in MATRIX_SIZES}

    def once(self) -> MachineRates:
        """What one pass of each reaches, the best matrix product of several sizes."""
        a, b, c = self._arrays
        moved = self._moved
        size = len(a)
        return MachineRates(
            copy_bytes_per_s=2 * moved / self._seconds(lambda: a.copy_(b)),
            triad_bytes_per_s=3 * moved / self._seconds(lambda: torch.add(b, c, alpha=3, out=a)),
            read_bytes_per_s=moved / self._seconds(lambda: a.view(-1, 1024).amax(1) if size % 1024 == 0 else a.amax()),
            flops_per_s=max(2 * n**3 / self._seconds(act) for n, act in self._products.items()),
        )

    def _seconds(self, act: Callable[[], object]) -> float:
        began = self._clock()
        act()
        if self._device == "cuda":
            torch.cuda.synchronize()
        return self._clock() - began


def measure_rates(
    *,
    device: str,
    dtype: torch.dtype,
    num_bytes: int,
    quick: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> MachineRates:
    """The best of several passes of a `RateMeter`."""
    meter = RateMeter(device=device, dtype=dtype, num_bytes=num_bytes, clock=clock)
    return joined((meter.once() for _ in range(4 if quick else 11)), max)


def joined(passes: Iterable[MachineRates], of: Callable[[Sequence[float]], float]) -> MachineRates:
    """One figure of each rate for several passes: their best, or their median."""
    each = [astuple(one) for one in passes]
    copy, triad, read, flops = (of(figures) for figures in zip(*each, strict=True))
    return MachineRates(copy_bytes_per_s=copy, triad_bytes_per_s=triad, read_bytes_per_s=read, flops_per_s=flops)


def _product(size: int, device: str, dtype: torch.dtype) -> Callable[[], object]:
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return lambda: left @ right
