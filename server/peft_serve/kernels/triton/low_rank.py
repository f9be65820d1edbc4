"""Low-rank terms of many adapters on a GPU, y[t] += B_k (A_k x[t]), whatever their ranks: a shrink and an expand.
Where x is an id, as at an embedding, A's column is looked up in place of the shrink.

The twin of `kernels.low_rank`. Layers that read one tensor share a shrink: that they do is seen as they run, by the
memory they are given, and holds among layers of one parent. Where factors lie is told to the kernels by
`entries`, whose tokens they concern by `tiles`; both are memory on the device that stays where it is, so that a step
captured in a CUDA graph serves any adapters (`LowRankKernel.bucket`). Nothing is launched but by an op.

Sums are float32, A x is rounded to the factors' type as it is in peft, and y is rounded once. A token's term is
computed from its own adapter and in one order of sums whatever the step; see `low_rank_kernels`.

Shapes: `T` tokens, `I` in and `O` out features, `R` rank, `S` slots, `M` layers that share a shrink.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final
from weakref import WeakKeyDictionary

import torch
import triton
from torch import Tensor

from peft_serve.kernels.low_rank import Add, Segments
from peft_serve.kernels.triton.entries import sent
from peft_serve.kernels.triton.low_rank_grouped import RankGroup, add_rank_groups_, can_group, rank_groups
from peft_serve.kernels.triton.low_rank_kernels import expand
from peft_serve.kernels.triton.memory import DeviceMemory, Step
from peft_serve.kernels.triton.near import near
from peft_serve.kernels.triton.shrinking import DTYPES, is_same, looked_up, operand, shrunk, width_for
from peft_serve.kernels.triton.slabs import Piece, aligned
from peft_serve.kernels.triton.tiles import MANY, Bucket, Tiles

_MOST_SHARING: Final = 8  # layers of one shrink
_COLUMNS: Final = 128  # outputs of a program
_READ_AT: Final = 16  # bytes: factors begin at a multiple


class LongRuns(StrEnum):
    """How the terms of long runs are computed; short ones always by tiles."""

    TILES = "tiles"
    GROUPED = "grouped"  # torch's grouped products, in bfloat16


@dataclass(frozen=True, slots=True, eq=False)
class Shrunk:
    """u of a tensor, for the layers of a group: [parts, M, T, width] float32, the parts yet to be added up."""

    x: Tensor
    tiles: Tiles
    group: Group
    low: Tensor
    used: set[int] = field(default_factory=set)  # layers that have had theirs


@dataclass(frozen=True, slots=True, eq=False)
class _Own:
    """An adapter's factors at one layer, and where they lie: in a piece, or where they were given."""

    piece: Piece | None
    a_RI: Tensor
    b_RO: Tensor


class Group:
    """Layers that were seen to read one tensor."""

    def __init__(self, kernel: LowRankKernel, members: Iterable[LayerFactors]) -> None:
        self.members = tuple(members)
        self.places = {layer.index: place for place, layer in enumerate(self.members)}
        self.layers_M = kernel.kept(torch.tensor([layer.index for layer in self.members], dtype=torch.int32))
        for layer in self.members:
            layer.group = self


class LayerFactors:
    """The factors of one layer's adapters by slot."""

    fuses_vectors: Final = True

    def __init__(
        self,
        kernel: LowRankKernel,
        num_in: int,
        num_out: int,
        dtype: torch.dtype,
        parent: str | None = None,
        *,
        is_lookup: bool = False,
    ) -> None:
        """`is_lookup`: x is ids, below `num_in`."""
        self._kernel = kernel
        self._kept: dict[int, _Own] = {}
        self._coming: dict[int, Callable[[], None]] = {}
        self.index = kernel.memory.entries.add_layer()
        self.num_in, self.num_out = num_in, num_out
        self.is_lookup = is_lookup
        self.dtype = dtype
        self.parent = parent
        self.group = Group(kernel, [self])

    def put(self, slot: int, a_RI: Tensor, b_OR: Tensor) -> None:
        """Keep an adapter's factors: A as it is, B turned, so that both are read along their rows.

        They are copied on the current stream, without the host waiting where they lie in pinned memory.
        """
        rank = len(a_RI)
        assert a_RI.shape == (rank, self.num_in), "a factor fits its layer"
        assert b_OR.shape == (self.num_out, rank), "a factor fits its layer"
        self.drop(slot)
        if not rank:
            return
        behind_a = aligned(a_RI.numel() * self.dtype.itemsize)
        with self._kernel.memory.slabs.taken(behind_a + b_OR.numel() * self.dtype.itemsize) as piece:
            own_RI = piece.view(0, (rank, self.num_in), self.dtype)
            own_RO = piece.view(behind_a, (rank, self.num_out), self.dtype)
            own_RI.copy_(a_RI, non_blocking=True)
            own_RO.copy_(b_OR.to(own_RO.device, non_blocking=True).t())
        self._keep(slot, _Own(piece, own_RI, own_RO))

    def put_early(self, slot: int, a_RI: Tensor, b_OR: Tensor, wait: Callable[[], None]) -> None:
        """Keep factors that are on their way to the device, A as it is and B turned, where they will lie.

        The device is told to `wait` for them just before it is told to read them, and by then where they lie otherwise
        than they are read.
        """
        device, b_RO = self._kernel.memory.device, b_OR.t()
        is_ours = all(each.device == device and each.dtype is self.dtype for each in (a_RI, b_RO))
        is_straight = all(each.is_contiguous() and each.data_ptr() % _READ_AT == 0 for each in (a_RI, b_RO))
        if not (is_ours and is_straight and len(a_RI)):
            wait()
            self.put(slot, a_RI, b_OR)
            return
        self.drop(slot)
        self._keep(slot, _Own(None, a_RI, b_RO))
        self._coming[slot] = wait
        self._kernel.awaiting.add(self)

    def arrive(self) -> None:
        """What is told to the device from now on may read every factor."""
        for wait in self._coming.values():
            wait()
        self._coming.clear()
        self._kernel.awaiting.discard(self)

    def _keep(self, slot: int, own: _Own) -> None:
        self._kept[slot] = own
        self._kernel.written(slot, self.index, (own.a_RI.data_ptr(), own.b_RO.data_ptr(), len(own.a_RI), 0))

    def drop(self, slot: int) -> None:
        """Forget the slot, if it has something here. Ops that were made before are not to be called again."""
        own = self._kept.pop(slot, None)
        self._coming.pop(slot, None)
        if own is not None:
            self._kernel.written(slot, self.index, (0, 0, 0, 0))
            if own.piece is not None:
                self._kernel.memory.slabs.give_back(own.piece)

    def op(self, step: Step, out_scale: Tensor | None = None, shift: Tensor | None = None) -> Add:
        """Adds the terms of a step's adapters; those that have none here are passed over.

        With tables by slot, [S, O]: y = out_scale * y + B A x + shift for every token that a slot is named for.
        """
        kernel, tiles = self._kernel, self._kernel.memory.tiles(step)
        width = kernel.width(step)
        num_x = tiles.num_tokens * (1 if self.is_lookup else self.num_in)
        for table in (out_scale, shift):
            assert table is None or (table.is_contiguous() and table.shape[1] == self.num_out), "a table fits its layer"
            assert table is None or table.dtype is self.dtype, "a table is of the layer's type"

        groups = self._groups(step, tiles) if out_scale is None and shift is None else None

        def add(y: Tensor, x: Tensor) -> None:
            if x.numel() != num_x or y.numel() != tiles.num_tokens * self.num_out:
                raise ValueError(f"factors for {tiles.num_tokens} tokens got x {x.shape} and y {y.shape}")
            if not len(tiles):
                return
            if groups is not None and y.is_contiguous():
                self.arrive()
                x_TI = x.to(self.dtype).reshape(tiles.num_tokens, self.num_in)
                add_rank_groups_(y.view(tiles.num_tokens, self.num_out), x_TI, groups)
                return
            low = kernel.shrunk(self, x, tiles, width)
            if y.dtype is self.dtype and y.is_contiguous():
                kernel.expand(self, y, low, out_scale, shift)
                return
            own = y.to(self.dtype).contiguous()
            kernel.expand(self, own, low, out_scale, shift)
            y.copy_(own)

        return add

    def _groups(self, step: Step, tiles: Tiles) -> tuple[RankGroup, ...] | None:
        """The step for torch's grouped products, where these are to compute it."""
        if isinstance(step, Bucket) or not self._kernel.groups(self, tiles):
            return None
        own = ((first, last, self._kept.get(slot)) for slot, first, last in step.each)
        runs = ((first, last, one.a_RI, one.b_RO) for first, last, one in own if one is not None)
        return rank_groups(runs, self._kernel.memory.device)


class LowRankKernel:
    """The kernels on one device, with the memory that they read. One thread at a time.

    `part` is how many inputs are summed before sums are added up, in steps of the kernels; it fixes the order of sums.
    `long_runs` is how steps with long runs of tokens are computed, where there is a choice (`low_rank_grouped`).
    """

    def __init__(
        self,
        device: torch.device,
        *,
        num_slots: int = 256,
        part: int = 512,
        slab_bytes: int = 4 << 20,
        long_runs: LongRuns = LongRuns.TILES,
    ) -> None:
        self.memory = DeviceMemory(device, num_slots=num_slots, slab_bytes=slab_bytes)
        self._part = part
        self._long_runs = long_runs
        self._ranks: dict[int, dict[int, int]] = {}  # by slot and layer
        self._widths: WeakKeyDictionary[Segments, int] = WeakKeyDictionary()
        self._last: Shrunk | None = None
        self.awaiting: set[LayerFactors] = set()  # layers with factors on their way
        self._named: list[Tensor] = []

    def serves(self, like: Tensor) -> bool:
        """Whether it computes with tensors of this kind."""
        return like.dtype in DTYPES and like.device == self.memory.device

    def layer(self, num_in: int, num_out: int, dtype: torch.dtype, parent: str | None = None) -> LayerFactors:
        """A layer without factors yet. Layers of one parent, a path, may be given the same inputs."""
        return LayerFactors(self, num_in, num_out, dtype, parent)

    def lookup(self, num_ids: int, num_out: int, dtype: torch.dtype) -> LayerFactors:
        """A layer that is given ids [T] in place of x."""
        return LayerFactors(self, num_ids, num_out, dtype, is_lookup=True)

    def bucket(self, num_tokens: int, *, max_rank: int) -> Bucket:
        """Tiles for any step of up to so many tokens, of adapters up to this rank; for a CUDA graph.

        Ops on it are captured once. Before each replay the bucket is filled (`fill`); a graph that was captured before
        `memory.num_moves` changed is to be captured anew.
        """
        return Bucket(num_tokens, self.memory.device, max_rank=max_rank)

    def fill(self, bucket: Bucket, segments: Segments) -> None:
        """Have ops on the bucket serve this step. ValueError where the bucket has no room for it."""
        if not self.fits(segments, bucket.max_rank):
            rank = max(self._rank(slot) for slot, _, _ in segments.each)
            raise ValueError(f"an adapter of rank {rank} does not fit a bucket for ranks up to {bucket.max_rank}")
        self.memory.reach(segments.num_slots)
        self.memory.publish()
        bucket.fill(segments)
        self._last = None

    def kept(self, host: Tensor) -> Tensor:
        """A few numbers on the device that stay there: a captured shrink reads them when its group is long another."""
        self._named.append(sent(host, self.memory.device))
        return self._named[-1]

    def fits(self, segments: Segments, max_rank: int) -> bool:
        """Whether a bucket for such ranks has room for the adapters of a step."""
        return all(self._rank(slot) <= max_rank for slot, _, _ in segments.each)

    def written(self, slot: int, layer: int, numbers: tuple[int, int, int, int]) -> None:
        """A layer has other factors."""
        self.memory.entries.write(slot, layer, numbers)
        ranks = self._ranks.setdefault(slot, {})
        ranks[layer] = numbers[2]
        if not any(ranks.values()):
            del self._ranks[slot]
        self._widths.clear()
        self._last = None

    def groups(self, layer: LayerFactors, tiles: Tiles) -> bool:
        """Whether a layer's terms in such a step are torch's grouped products."""
        is_asked = self._long_runs is LongRuns.GROUPED and tiles.height == MANY
        return is_asked and not layer.is_lookup and can_group(layer.num_in, layer.num_out, layer.dtype)

    def width(self, step: Step) -> int:
        """Room for the ranks of a step's adapters."""
        if isinstance(step, Bucket):
            return width_for(step.max_rank)
        if step not in self._widths:
            self._widths[step] = width_for(max((self._rank(slot) for slot, _, _ in step.each), default=0))
        return self._widths[step]

    def _rank(self, slot: int) -> int:
        return max(self._ranks.get(slot, {}).values(), default=0)

    def shrunk(self, layer: LayerFactors, x: Tensor, tiles: Tiles, width: int) -> Shrunk:
        """A x of a layer, and with it those of the layers that were seen to read the same x."""
        last = self._last
        if last is not None and last.tiles is tiles and is_same(last.x, x):
            if layer.index not in last.group.places:
                self._join(last.group, layer)
            elif layer.index not in last.used:
                last.used.add(layer.index)
                return last
        self._last = made = self._shrink(layer, x, tiles, width)
        return made

    def _join(self, group: Group, layer: LayerFactors) -> None:
        first = group.members[0]
        members = (*group.members, *layer.group.members)
        is_near = layer.parent is not None and layer.parent == first.parent
        if is_near and (layer.num_in, layer.dtype) == (first.num_in, first.dtype) and len(members) <= _MOST_SHARING:
            Group(self, members)

    def _shrink(self, layer: LayerFactors, x: Tensor, tiles: Tiles, width: int) -> Shrunk:
        if self.awaiting:
            for each in self.awaiting.intersection(layer.group.members):  # all of them are read at once
                each.arrive()
        if layer.is_lookup:
            low = looked_up(x.reshape(-1), layer, self.memory.entries, tiles, width=width)
        else:
            given = x.to(layer.dtype).contiguous().view(tiles.num_tokens, layer.num_in)
            low = shrunk(given, layer.group.layers_M, self.memory.entries, tiles, width=width, part=self._part)
        return Shrunk(x, tiles, layer.group, low, {layer.index})

    def expand(
        self, layer: LayerFactors, y: Tensor, given: Shrunk, out_scale: Tensor | None, shift: Tensor | None
    ) -> None:
        """Add B u to y, which lies without gaps, with the vectors of the layer's adapters where there are any."""
        tiles, low = given.tiles, given.low
        with near(y):
            expand[len(tiles), triton.cdiv(layer.num_out, _COLUMNS)](
                y,
                low[0, given.group.places[layer.index]],
                self.memory.entries.table,
                tiles.table_N3,
                y if out_scale is None else out_scale,
                y if shift is None else shift,
                layer.index,
                self.memory.entries.num_layers,
                layer.num_out,
                low.shape[3],
                low.shape[0],
                low.stride(0),
                HEIGHT=tiles.height,
                COLUMNS=_COLUMNS,
                HAS_SCALE=out_scale is not None,
                HAS_SHIFT=shift is not None,
                OPERAND=operand(layer.dtype),
            )
