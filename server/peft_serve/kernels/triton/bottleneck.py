"""Bottlenecks of many adapters on a GPU, y = scale * (U act(D x + b) + c): two launches, whatever their sizes.

Parameters are read where they lie, nothing of them is copied for a step, so a captured step serves any of them. The
first launch is that of low-rank terms, see `shrinking`; the second `bottleneck_kernels`. A token's result has one order
of sums, which is its adapter's.

Shapes: `T` tokens, `D` features of the model, `B` of a bottleneck.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
from torch import Tensor

from peft_serve.kernels.bottleneck import Lift, Squeeze
from peft_serve.kernels.low_rank import Segments
from peft_serve.kernels.triton.bottleneck_kernels import lift
from peft_serve.kernels.triton.entries import Entries, Room, sent
from peft_serve.kernels.triton.memory import DeviceMemory
from peft_serve.kernels.triton.near import near
from peft_serve.kernels.triton.shrinking import DTYPES, operand, shrunk, width_for
from peft_serve.kernels.triton.slabs import Piece, aligned
from peft_serve.kernels.triton.tiles import Bucket

ACTIVATIONS: Final = frozenset(
    (
        *("relu", "relu6", "leakyrelu", "gelu", "gelu_new", "gelu_fast", "quick_gelu"),
        *("swish", "silu", "tanh", "sigmoid", "mish", "linear"),
    )
)
_RANKS: Final = 64  # bottleneck features of a pass, and
_COLUMNS: Final = 128  # outputs of a program
_PART: Final = 512  # inputs that are summed up before sums are added


class LayerSqueezes:
    """The bottlenecks of one layer's adapters by slot."""

    def __init__(
        self, memory: DeviceMemory, entries: Entries, room: Room, num_features: int, dtype: torch.dtype
    ) -> None:
        self._memory, self._entries, self._room = memory, entries, room
        self._num_features, self._dtype = num_features, dtype
        self._index = entries.add_layer()
        self._layers_M = sent(torch.tensor([self._index], dtype=torch.int32), memory.device)
        self._kept: dict[int, tuple[Piece, int]] = {}  # with the size of the bottleneck

    def put(self, slot: int, squeeze: Squeeze) -> None:
        """Keep an adapter's parameters; copied on the current stream."""
        size, num_features = squeeze.down_BD.shape
        assert num_features == self._num_features, "a bottleneck fits its layer"
        assert squeeze.up_DB.shape == (num_features, size), "a bottleneck fits its layer"
        self.drop(slot)
        matrix, vectors = aligned(size * num_features * self._dtype.itemsize), 2 * num_features + size
        with self._memory.slabs.taken(2 * matrix + vectors * self._dtype.itemsize) as piece:
            down_BD = piece.view(0, (size, num_features), self._dtype)
            up_BD = piece.view(matrix, (size, num_features), self._dtype)
            own_V = piece.view(2 * matrix, (vectors,), self._dtype)
            down_BD.copy_(squeeze.down_BD, non_blocking=True)
            up_BD.copy_(squeeze.up_DB.to(up_BD.device, non_blocking=True).t())
            own_V.copy_(torch.cat([squeeze.up_bias_D, squeeze.scale_D, squeeze.down_bias_B]), non_blocking=True)
        self._kept[slot] = piece, size
        self._room.hold(size)
        self._entries.write(slot, self._index, (down_BD.data_ptr(), up_BD.data_ptr(), size, own_V.data_ptr()))

    def drop(self, slot: int) -> None:
        """Forget the slot, if it has something here. Ops that were made before are not to be called again."""
        kept = self._kept.pop(slot, None)
        if kept is not None:
            self._entries.write(slot, self._index, (0, 0, 0, 0))
            self._memory.slabs.give_back(kept[0])

    def op(self, segments: Segments, activation: str) -> Lift:
        """For tokens of adapters that have a bottleneck here, all with this activation; others are passed over."""
        tiles = self._memory.tiles(segments)
        self._entries.reach(segments.num_slots)
        sizes = [self._kept[slot][1] for slot, _, _ in segments.each if slot in self._kept]
        width = width_for(self._room.size if isinstance(segments, Bucket) else max(sizes, default=0))
        shape = (tiles.num_tokens, self._num_features)

        def run(x_TD: Tensor) -> Tensor:
            if x_TD.shape != shape:
                raise ValueError(f"bottlenecks for {list(shape)} got x {x_TD.shape}")
            x_TD = x_TD.to(self._dtype).contiguous()
            low = shrunk(x_TD, self._layers_M, self._entries, tiles, width=width, part=_PART)
            y_TD = torch.empty_like(x_TD)
            with near(x_TD):
                lift[len(tiles), triton.cdiv(self._num_features, _COLUMNS)](
                    y_TD,
                    low,
                    self._entries.table,
                    tiles.table_N3,
                    self._index,
                    self._entries.num_layers,
                    self._num_features,
                    width,
                    low.shape[0],
                    low.stride(0),
                    HEIGHT=tiles.height,
                    RANKS=_RANKS,
                    COLUMNS=_COLUMNS,
                    ACTIVATION=activation,
                    OPERAND=operand(self._dtype),
                )
            return y_TD

        return run


class BottleneckKernel:
    """Makes layers in the memory that other kernels of the base use too, with a table of its own: layers are added to
    it as adapters bring the first bottlenecks for them. One thread at a time."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._entries = memory.table()
        self._room = Room(self._entries, _RANKS)

    def serves(self, like: Tensor, activation: str) -> bool:
        """Whether it computes with tensors of this kind and knows the activation."""
        return like.dtype in DTYPES and like.device == self._memory.device and activation in ACTIVATIONS

    def layer(self, num_features: int, dtype: torch.dtype) -> LayerSqueezes:
        """A layer without bottlenecks yet."""
        return LayerSqueezes(self._memory, self._entries, self._room, num_features, dtype)
