"""Block-diagonal maps of many adapters on a GPU, x -> concat_j(x_j R_j): blocks of any size, one launch a layer.

The blocks are read where they lie, nothing of them is copied for a step, so a captured step serves any of them. See
`memory` for what tells the kernel of them, and `mixing_kernels` for the order of sums, which is the adapter's alone.

Shapes: `T` tokens, `D` features, `n` blocks of size `k`, n k = D.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from peft_serve.kernels.low_rank import Segments
from peft_serve.kernels.mixing import Mix
from peft_serve.kernels.triton.entries import Entries, Room
from peft_serve.kernels.triton.memory import DeviceMemory
from peft_serve.kernels.triton.mixing_kernels import mix
from peft_serve.kernels.triton.near import near
from peft_serve.kernels.triton.shrinking import DTYPES, operand
from peft_serve.kernels.triton.slabs import Piece
from peft_serve.kernels.triton.tiles import Bucket, Tiles

_SMALL: Final = 16  # blocks up to this size are read whole, others in squares:
_SIDE: Final = 32


class LayerBlocks:
    """The blocks of one layer's adapters by slot."""

    def __init__(self, memory: DeviceMemory, entries: Entries, num_features: int, dtype: torch.dtype) -> None:
        self._memory, self._entries = memory, entries
        self._num_features, self._dtype = num_features, dtype
        self._index = entries.add_layer()
        self._room = Room(entries, 1)
        self._kept: dict[int, tuple[Piece, int]] = {}  # with how many places the adapter has

    def put(self, slot: int, blocks_NKK: Tensor) -> None:
        """Keep an adapter's blocks; copied on the current stream."""
        num_blocks, size = blocks_NKK.shape[:2]
        assert blocks_NKK.shape == (num_blocks, size, size), "blocks are squares"
        assert num_blocks * size == self._num_features, "blocks fit their layer"
        self.drop(slot)
        with self._memory.slabs.taken(blocks_NKK.numel() * self._dtype.itemsize) as piece:
            own_NKK = piece.view(0, tuple(blocks_NKK.shape), self._dtype)
            own_NKK.copy_(blocks_NKK, non_blocking=True)
        num_places = num_blocks * -(-size // (_SMALL if size <= _SMALL else _SIDE))
        self._kept[slot] = piece, num_places
        self._room.hold(num_places)
        self._entries.write(slot, self._index, (own_NKK.data_ptr(), size, num_blocks, 0))

    def drop(self, slot: int) -> None:
        """Forget the slot, if it has something here. Ops that were made before are not to be called again."""
        kept = self._kept.pop(slot, None)
        if kept is not None:
            self._entries.write(slot, self._index, (0, 0, 0, 0))
            self._memory.slabs.give_back(kept[0])

    def op(self, segments: Segments) -> Mix:
        """Mixes the tokens of a step's adapters; those that have nothing here are passed over."""
        tiles = self._memory.tiles(segments)
        self._entries.reach(segments.num_slots)
        own = (self._kept[slot][1] for slot, _, _ in segments.each if slot in self._kept)
        num_places = self._room.size if isinstance(segments, Bucket) else max(own, default=0)
        shape = (tiles.num_tokens, self._num_features)

        def run(y_TD: Tensor, x_TD: Tensor) -> None:
            if x_TD.shape != shape or y_TD.shape != shape:
                raise ValueError(f"blocks for {list(shape)} got x {x_TD.shape} and y {y_TD.shape}")
            assert y_TD.data_ptr() != x_TD.data_ptr() or not shape[0], "what is read is not written"
            if not num_places:
                return
            x_TD = x_TD.to(self._dtype).contiguous()
            own_TD = y_TD.to(self._dtype).contiguous()  # y itself, as a rule
            self._mix(own_TD, x_TD, tiles, num_places)
            if own_TD is not y_TD:
                y_TD.copy_(own_TD)

        return run

    def _mix(self, y_TD: Tensor, x_TD: Tensor, tiles: Tiles, num_places: int) -> None:
        entries = self._entries
        entries.publish()
        with near(y_TD):
            mix[len(tiles), num_places](
                y_TD,
                x_TD,
                entries.table,
                tiles.table_N3,
                self._index,
                entries.num_layers,
                self._num_features,
                HEIGHT=tiles.height,
                OPERAND=operand(self._dtype),
            )


class MixingKernel:
    """Makes layers in the memory that other kernels of the base use too, with a table of its own: layers are added to
    it as adapters bring the first blocks for them. One thread at a time."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._entries = memory.table()

    def serves(self, like: Tensor) -> bool:
        """Whether it computes with tensors of this kind."""
        return like.dtype in DTYPES and like.device == self._memory.device

    def layer(self, num_features: int, dtype: torch.dtype) -> LayerBlocks:
        """A layer without blocks yet."""
        return LayerBlocks(self._memory, self._entries, num_features, dtype)
