"""The arena: one piece of device memory for KV blocks and adapters, cut into blocks of one size.

Every block lies in one stretch, keys and values of all its layers behind each other, so that it serves either side:
the KV pool reads it as positions, an adapter as plain bytes; neighbouring blocks are one stretch for what is larger.
Who has which block is the scheduler's book.

A block's *number* is that of its first part, a part being the keys, or the values, of one layer: a layer's view begins
at its own part, and a number leads to the same block in each of them. So kernels that find block b at b times its size
need not know how far apart blocks lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_serve.model.zeros import lazy_zeros


class Arena:
    """Blocks of `num_parts` parts each. All of it is zero at first."""

    def __init__(self, *, num_blocks: int, num_parts: int, part_bytes: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.num_parts = num_parts
        self.block_bytes = num_parts * part_bytes
        self.memory = lazy_zeros((num_blocks * self.block_bytes,), torch.uint8, device)

    @property
    def device(self) -> torch.device:
        return self.memory.device

    def stretch(self, number: int, num_blocks: int) -> Tensor:
        """The bytes of a block and its neighbours behind it."""
        index, rest = divmod(number, self.num_parts)
        assert not rest, f"no block has the number {number}: blocks have {self.num_parts} parts"
        assert 0 < index <= self.num_blocks - num_blocks, "a stretch lies in the arena, behind the padding block"
        return self.memory[index * self.block_bytes : (index + num_blocks) * self.block_bytes]
