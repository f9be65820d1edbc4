"""Gated prompts of many adapters on a GPU, o + gate * softmax(q K^T / sqrt(D)) V: one launch an attention.

Prompts are read where they lie, nothing of them is copied for a step, so a captured step serves any of them. See
`memory` for what tells the kernel of them, and `gated_kernels` for the order of sums, which is the adapter's alone.

Shapes: `T` tokens, `Q` query heads, `H` heads of keys and values, `M` learned tokens, `D` head size.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
from torch import Tensor

from peft_serve.kernels.gated import AddGated
from peft_serve.kernels.low_rank import Segments
from peft_serve.kernels.triton.entries import Entries
from peft_serve.kernels.triton.gated_kernels import add_gated
from peft_serve.kernels.triton.memory import DeviceMemory
from peft_serve.kernels.triton.near import near
from peft_serve.kernels.triton.shrinking import DTYPES, operand
from peft_serve.kernels.triton.slabs import Piece, aligned
from peft_serve.kernels.triton.tiles import Tiles

_KEYS: Final = 16  # learned tokens that are read at once
_LEAST_SIZE: Final = 16  # that tensor cores multiply


class LayerPrompts:
    """The prompts of one attention's adapters by slot."""

    def __init__(
        self, memory: DeviceMemory, entries: Entries, num_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        self._memory, self._entries = memory, entries
        self._num_heads, self._head_dim, self._dtype = num_heads, head_dim, dtype
        self._index = entries.add_layer()
        self._kept: dict[int, Piece] = {}

    def put(self, slot: int, keys_HMD: Tensor, values_HMD: Tensor, gate: Tensor) -> None:
        """Keep an adapter's prompt; copied on the current stream."""
        num_own, num_keys, head_dim = shape = tuple(keys_HMD.shape)
        assert values_HMD.shape == shape, "a value for each key"
        assert head_dim == self._head_dim, "a prompt fits its attention"
        assert not self._num_heads % num_own, "a prompt fits its attention"
        self.drop(slot)
        half = aligned(keys_HMD.numel() * self._dtype.itemsize)
        with self._memory.slabs.taken(2 * half + self._dtype.itemsize) as piece:
            own_keys, own_values = (piece.view(at, shape, self._dtype) for at in (0, half))
            own_keys.copy_(keys_HMD, non_blocking=True)
            own_values.copy_(values_HMD, non_blocking=True)
            own_gate = piece.view(2 * half, (1,), self._dtype)
            own_gate.copy_(gate.reshape(1), non_blocking=True)
        self._kept[slot] = piece
        sizes = num_own << 32 | num_keys
        self._entries.write(slot, self._index, (own_keys.data_ptr(), own_values.data_ptr(), sizes, own_gate.data_ptr()))

    def drop(self, slot: int) -> None:
        """Forget the slot, if it has something here. Ops that were made before are not to be called again."""
        piece = self._kept.pop(slot, None)
        if piece is not None:
            self._entries.write(slot, self._index, (0, 0, 0, 0))
            self._memory.slabs.give_back(piece)

    def op(self, segments: Segments) -> AddGated:
        """Adds what the prompts of a step's adapters give; those that have nothing here are passed over."""
        tiles = self._memory.tiles(segments)
        self._entries.reach(segments.num_slots)
        shape = (tiles.num_tokens, self._num_heads, self._head_dim)

        def run(to_TQD: Tensor, q_TQD: Tensor) -> None:
            if to_TQD.shape != shape or q_TQD.shape != shape:
                raise ValueError(f"prompts for {list(shape)} got o {to_TQD.shape} and q {q_TQD.shape}")
            own_TQD = to_TQD.to(self._dtype).contiguous()  # o itself, as a rule
            self._add(own_TQD, q_TQD.to(self._dtype).contiguous(), tiles)
            if own_TQD is not to_TQD:
                to_TQD.copy_(own_TQD)

        return run

    def _add(self, to_TQD: Tensor, q_TQD: Tensor, tiles: Tiles) -> None:
        self._entries.publish()
        with near(to_TQD):
            add_gated[len(tiles), self._num_heads](
                to_TQD,
                q_TQD,
                self._entries.table,
                tiles.table_N3,
                self._index,
                self._entries.num_layers,
                self._num_heads,
                self._head_dim,
                self._head_dim**-0.5,
                HEIGHT=tiles.height,
                KEYS=_KEYS,
                SIZE=max(_LEAST_SIZE, triton.next_power_of_2(self._head_dim)),
                OPERAND=operand(self._dtype),
            )


class GatedKernel:
    """Makes layers in the memory that other kernels of the base use too, with a table of its own: layers are added to
    it as adapters bring the first prompts for them. One thread at a time."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._entries = memory.table()

    def serves(self, like: Tensor) -> bool:
        """Whether it computes with tensors of this kind."""
        return like.dtype in DTYPES and like.device == self._memory.device

    def layer(self, num_heads: int, head_dim: int, dtype: torch.dtype) -> LayerPrompts:
        """An attention without prompts yet."""
        return LayerPrompts(self._memory, self._entries, num_heads, head_dim, dtype)
