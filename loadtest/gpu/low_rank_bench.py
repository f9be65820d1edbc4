"""Low-rank terms of one layer: our kernels and torch's ways in turns, over ranks, popularity and length, beside
their bytes.

Decode rows by Punica's popularities (arXiv:2310.18547): torch has one batched product for each width. Prompts, each of
another adapter: torch has two products for each adapter. For both it has two grouped ones over all adapters of a rank
(`low_rank_grouped`). Layers take turns, so that the factors of one do not stay in a cache until it is asked again.
"""

from dataclasses import dataclass
from itertools import cycle
from typing import Final

import torch
from torch import Tensor

from loadtest.gpu.facts import ceilings
from loadtest.gpu.ground import Ground
from loadtest.gpu.kernels import kernels_for
from loadtest.gpu.popularity_bench import POPULARITIES, slots_of
from loadtest.gpu.results import Figures, Found, Value
from loadtest.gpu.timing import Act, KernelTime, kernels_in_turns
from peft_serve.kernels.grids import add_low_rank_grids_, grids_of
from peft_serve.kernels.grouped import add_low_rank_runs_, parts_of
from peft_serve.kernels.low_rank import Segments

RANKS: Final = (16, 8, 64)
_SIZE: Final = 4096  # in and out features
_LAYERS: Final = 16
_MOST_S: Final = 2.0  # of one point, and less where many are left
_NEEDS_S: Final = 1.0
ROWS: Final = (32, 8, 64)  # of decode steps; the number that is promised something first
_LENGTHS: Final = (64, 512, 4096)  # of prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A rank, and the slot of each row; rows have equally many tokens."""

    what: str
    rank: int
    slots: tuple[int, ...]
    num_tokens: int = 1

    @property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """(slot, first token, last + 1) of each adapter's tokens, side by side."""
        runs, at = [], 0
        for slot in sorted(set(self.slots)):
            count = self.slots.count(slot) * self.num_tokens
            runs.append((slot, at, at + count))
            at += count
        return tuple(runs)


def points(*, is_quick: bool) -> list[Point]:
    """Decode by rank and popularity, then prompts."""
    if is_quick:
        decode = Point(what="decode 4, distinct", rank=16, slots=(1, 2, 3, 4))
        return [decode, Point(what="prompts 2 of 5", rank=16, slots=(1, 2), num_tokens=5)]
    first, *others = (
        [
            Point(what=f"decode {num_rows}, {name}", rank=rank, slots=tuple(sorted(slots_of(name, num_rows))))
            for name in POPULARITIES
            for rank in RANKS
        ]
        for num_rows in ROWS
    )
    prompts = [
        Point(
            what=f"prompts {2048 // n or 1} of {n}",
            rank=rank,
            slots=tuple(range(1, 1 + (2048 // n or 1))),
            num_tokens=n,
        )
        for n in _LENGTHS
        for rank in (16, 64)
    ]
    return [*first, *prompts, *(point for one in others for point in one)]


@torch.inference_mode()
def low_rank(ground: Ground) -> Found:
    """One row of the table for each point."""
    rows: list[tuple[Value, ...]] = []
    left_out: tuple[str, ...] = ()
    all_points = points(is_quick=ground.is_quick)
    for place, point in enumerate(all_points):
        if rows and ground.left_s < _NEEDS_S:
            left_out = (f"{point.what}, rank {point.rank}, and what is behind it: no time was left",)
            break
        rows.append(_measured(ground, point, most_s=min(_MOST_S, ground.left_s / (len(all_points) - place))))
    columns = (
        *("step", "rank", "adapters", "kernel us", "spread", "launch us", "torch us", "torch grouped us"),
        *("bytes us", "kernel over bytes", "torch over kernel", "grouped over kernel"),
    )
    title = f"Low-rank terms, one layer of {_size(ground)} by {_size(ground)}"
    return Found(figures=(Figures(title=title, columns=columns, rows=tuple(rows)),), left_out=left_out)


def _measured(ground: Ground, point: Point, *, most_s: float) -> tuple[Value, ...]:
    layers = _Layers(ground, point)
    acts: dict[str, Act] = {"kernel": layers.ours(), "torch": layers.torch(), "torch grouped": layers.grouped()}
    took: dict[str, KernelTime] = kernels_in_turns(ground, acts, most_s=most_s)
    ours, plain, size = took["kernel"].device, took["torch"].device, _size(ground)
    num_tokens, itemsize = len(point.slots) * point.num_tokens, layers.dtype.itemsize
    # A and B once each, x once, y read and written.
    num_bytes = itemsize * (2 * size * point.rank * len(set(point.slots)) + 3 * num_tokens * size)
    bound_s = num_bytes / ceilings(ground).bytes_per_s
    grouped = took["torch grouped"].device
    return (
        *(point.what, point.rank, len(set(point.slots)), 1e6 * ours.median_s, ours.words),
        *(1e6 * took["kernel"].host.median_s, 1e6 * plain.median_s),
        *(1e6 * grouped.median_s, 1e6 * bound_s, ours.median_s / bound_s),
        *(plain.median_s / ours.median_s, grouped.median_s / ours.median_s),
    )


class _Layers:
    """Layers of one size with random factors, and the ways to compute their terms; each call takes the next layer."""

    def __init__(self, ground: Ground, point: Point) -> None:
        self.dtype = torch.bfloat16 if ground.is_gpu else torch.float32
        self._point, self._device, size = point, ground.device, _size(ground)
        self._used = sorted(set(point.slots))
        num_tokens, count = len(point.slots) * point.num_tokens, 2 if ground.is_quick else _LAYERS
        self._x, self._y = self._small(num_tokens, size), self._small(num_tokens, size)
        stack = len(self._used) * point.rank
        self._stacks = [(self._small(stack, size), self._small(stack, size)) for _ in range(count)]
        self._ground = ground

    def ours(self) -> Act:
        """One launch for all adapters, and one more."""
        kernel = kernels_for(self._ground).low_rank
        segments, size, rank, ops = Segments(self._point.runs, len(self._x)), _size(self._ground), self._point.rank, []
        for a_RI, b_RO in self._stacks:
            layer = kernel.layer(size, size, self.dtype)
            for slot, low in self._rows():
                layer.put(slot, a_RI[low : low + rank], b_RO[low : low + rank].t())
            ops.append(layer.op(segments))
        each = cycle(ops)
        return lambda: next(each)(self._y, self._x)

    def torch(self) -> Act:
        """A batched product for decode rows, two products an adapter for prompts."""
        rank = self._point.rank
        first = dict(self._rows())
        pieces = [(begin, end, first[slot], first[slot] + rank) for slot, begin, end in self._point.runs]
        if self._point.num_tokens > 1:
            parts = cycle([parts_of(a, b, pieces) for a, b in self._stacks])
            return lambda: add_low_rank_runs_(self._y, self._x, next(parts))
        grids = grids_of(pieces, self._device)
        assert grids is not None, "equal ranks side by side are a grid"
        ready = cycle([tuple((grid, grid.rows(a), grid.rows(b)) for grid in grids) for a, b in self._stacks])
        return lambda: add_low_rank_grids_(self._y, self._x, next(ready))

    def grouped(self) -> Act:
        """Two grouped products over all adapters, whose factors were put side by side before: that costs a step, too,
        and is left out here, as are the slots' own copies."""
        from peft_serve.kernels.triton.low_rank_grouped import add_rank_groups_, rank_groups

        first, rank = dict(self._rows()), self._point.rank
        ready = cycle(
            [
                rank_groups(
                    [
                        (begin, end, a_RI[first[slot] : first[slot] + rank], b_RO[first[slot] : first[slot] + rank])
                        for slot, begin, end in self._point.runs
                    ],
                    self._device,
                )
                for a_RI, b_RO in self._stacks
            ]
        )
        return lambda: add_rank_groups_(self._y, self._x, next(ready))

    def _rows(self) -> list[tuple[int, int]]:
        """Each slot, and where its rows begin in the stacks."""
        return [(slot, place * self._point.rank) for place, slot in enumerate(self._used)]

    def _small(self, *size: int) -> Tensor:
        return (0.02 * torch.randn(size, device=self._device)).to(self.dtype)


def _size(ground: Ground) -> int:
    return 32 if ground.is_quick else _SIZE
