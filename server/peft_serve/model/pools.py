"""The paged memory of keys and values.

Owns the tensors, of one kind of attention, for every layer. Which block belongs to whom is the scheduler's
book; a pool only knows that block 0 is padding: it is read where a short row is padded to a longer one, and
it stays zero.

Shapes: `L` layers, `N` blocks, `S` positions in a block, `H` key/value heads, `D` head size, `T` tokens.
A *place* is a position of the whole pool: block * S + offset.

A pool has memory of its own, a tensor for keys and one for values, or lies in an `Arena` beside the adapters, block by
block; then a block's number counts parts, and a layer's views begin at its part of block 0. Whoever reads and writes by
block numbers and places need not know which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_serve.core import PADDING_BLOCK
from peft_serve.model.arena import Arena
from peft_serve.model.sending import sent
from peft_serve.model.zeros import lazy_zeros


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """The keys and values one position of context costs."""

    num_layers: int
    num_heads: int
    head_dim: int

    def bytes_per_block(self, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block, keys and values of all layers."""
        return 2 * self.num_layers * self.num_heads * self.head_dim * block_size * dtype.itemsize

    def num_blocks(self, num_bytes: int, block_size: int, dtype: torch.dtype) -> int:
        """How many blocks fit into `num_bytes`, the padding block included."""
        return num_bytes // self.bytes_per_block(block_size, dtype)


class KVPool:
    """Keys and values in blocks."""

    def __init__(
        self,
        shape: KVShape,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        arena: Arena | None = None,
    ) -> None:
        """`arena` has so many blocks of `shape` at least, on the device, and is this pool's alone but for adapters."""
        if num_blocks < 2:
            raise ValueError(
                f"a KV pool of {num_blocks} blocks holds no request: block 0 is padding, so it needs at least 2; "
                "give the KV cache more bytes or make the blocks smaller"
            )
        self.shape = shape
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.device = device
        num_layers = max(1, shape.num_layers)  # an encoder keeps nothing between steps: its pool has no layers
        self.bytes_per_block = shape.bytes_per_block(block_size, dtype) // num_layers  # of one layer
        self._spacing = 1 if arena is None else arena.num_parts  # from a block's number to that of the next
        size = (shape.num_layers, num_blocks, block_size, shape.num_heads, shape.head_dim)
        if arena is None:
            self._k_LNSHD = lazy_zeros(size, dtype, device)
            self._v_LNSHD = lazy_zeros(size, dtype, device)
            self._blocks = tuple(zip(self._k_LNSHD.unbind(0), self._v_LNSHD.unbind(0), strict=True))
        else:
            assert arena.block_bytes == shape.bytes_per_block(block_size, dtype), "an arena of other blocks"
            assert num_blocks <= arena.num_blocks, "an arena of fewer blocks"
            parts = arena.memory.view(dtype).view(arena.num_blocks * arena.num_parts, *size[2:])
            by_block = parts.view(arena.num_blocks, 2, shape.num_layers, *size[2:]).permute(1, 2, 0, 3, 4, 5)
            self._k_LNSHD, self._v_LNSHD = by_block[0], by_block[1]
            self._blocks = tuple((parts[i:], parts[shape.num_layers + i :]) for i in range(shape.num_layers))
        # Views by layer are made here once, not by every layer of every step.
        self._places = tuple((k.flatten(0, 1), v.flatten(0, 1)) for k, v in self._blocks)

    def number(self, index: int) -> int:
        """The number by which tables name the block that is so many blocks behind the padding block."""
        return index * self._spacing

    def write(self, layer: int, places_T: Tensor, k_THD: Tensor, v_THD: Tensor) -> None:
        """Store the step's keys and values at their places."""
        k, v = self._places[layer]
        k.index_copy_(0, places_T, k_THD)
        v.index_copy_(0, places_T, v_THD)

    def gather(self, layer: int, blocks: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """Copies [rows, H, blocks of a row * S, D] of what the block tables (rows * blocks of a row) name."""
        k, v = self._blocks[layer]
        size = (num_rows, -1, self.shape.num_heads, self.shape.head_dim)
        return (
            k.index_select(0, blocks).view(size).transpose(1, 2),
            v.index_select(0, blocks).view(size).transpose(1, 2),
        )

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's keys and values by place: views [N * S, H, D]."""
        return self._places[layer]

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero whole blocks.

        A block that changes hands is cleared before its first token is written: masked positions are read
        too, and what a stranger left there, were it not finite, would come through the mask.
        """
        if blocks:
            (index,) = sent([self._indices(blocks)], self.device)
            self._k_LNSHD.index_fill_(1, index, 0)
            self._v_LNSHD.index_fill_(1, index, 0)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks: (from, to). No block is both a source and a target of one call."""
        if not pairs:
            return
        each = ([a for a, _ in pairs], [b for _, b in pairs])
        sources, targets = sent([self._indices(numbers) for numbers in each], self.device)
        assert PADDING_BLOCK not in {b for _, b in pairs}, "block 0 is padding and is never written"
        self._k_LNSHD[:, targets] = self._k_LNSHD[:, sources]
        self._v_LNSHD[:, targets] = self._v_LNSHD[:, sources]

    def store(self, blocks: Sequence[int], keys_LHPD: Tensor, values_LHPD: Tensor) -> None:
        """Fill blocks from their first position with `P` given keys and values; the rest of them is zero.

        The two tensors are [L, H, P, D] of this pool's L, H and D.
        """
        num_positions = keys_LHPD.shape[2]
        index, offset = self._positions(blocks, num_positions)
        self.clear(blocks)
        for pool, given in ((self._k_LNSHD, keys_LHPD), (self._v_LNSHD, values_LHPD)):
            pool[:, index, offset] = given.to(device=self.device, dtype=pool.dtype).transpose(1, 2)

    def read(self, blocks: Sequence[int], num_positions: int) -> tuple[Tensor, Tensor]:
        """Copies of the first positions of a block table, as `store` takes them: [L, H, P, D] twice."""
        index, offset = self._positions(blocks, num_positions)
        k, v = (pool[:, index, offset].transpose(1, 2) for pool in (self._k_LNSHD, self._v_LNSHD))
        return k, v

    def _indices(self, numbers: Sequence[int]) -> list[int]:
        """Which of all blocks these are."""
        return [number // self._spacing for number in numbers]

    def _positions(self, blocks: Sequence[int], num_positions: int) -> tuple[Tensor, Tensor]:
        """The first positions of a block table: which block each is in, and where in it."""
        assert num_positions <= len(blocks) * self.block_size, f"{len(blocks)} blocks do not cover {num_positions}"
        index = [number for number in self._indices(blocks) for _ in range(self.block_size)][:num_positions]
        offset = [position % self.block_size for position in range(num_positions)]
        return torch.tensor(index, device=self.device), torch.tensor(offset, device=self.device)

    def check(self) -> None:
        """The padding block is zero."""
        assert not self._k_LNSHD[:, PADDING_BLOCK].any(), "keys were written into the padding block"
        assert not self._v_LNSHD[:, PADDING_BLOCK].any(), "values were written into the padding block"


def places_of(blocks: Sequence[int], start: int, num_tokens: int, block_size: int) -> list[int]:
    """The places of the context positions [start, start + num_tokens) of a block table."""
    stop = start + num_tokens
    assert stop <= len(blocks) * block_size, f"{len(blocks)} blocks of {block_size} do not cover {stop} positions"
    return [blocks[p // block_size] * block_size + p % block_size for p in range(start, stop)]
