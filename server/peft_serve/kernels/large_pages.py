"""Memory for numbers that every step reads from one end to the other, on large pages where the system has them.

A core that streams weights leaves a page of 4 KiB several million times a second, and each time has to look up where
the next one is. Linux gives pages of 2 MiB to memory that asks for them before it is written (madvise(2)). Owns the
pieces that small tensors share; a piece lives as long as a tensor in it. Elsewhere memory is torch's own.
"""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress
from typing import Final

import torch
from torch import Tensor

PAGE_BYTES: Final = 2 << 20
PIECE_BYTES: Final = 32 << 20
_LINE_BYTES: Final = 64  # of a cache


class LargePages:
    """Gives out memory and takes none back: for what is made once, at start."""

    def __init__(self) -> None:
        self._piece: mmap.mmap | None = None
        self._at = self._end = 0  # what is free of it

    def empty(self, num_numbers: int, dtype: torch.dtype) -> Tensor:
        """[num_numbers] that nobody has written, at the start of a cache line, with a storage of its own. Where nothing
        has been written, no memory is taken yet."""
        if sys.platform != "linux" or not num_numbers:
            return torch.empty(num_numbers, dtype=dtype)
        taken = -(-num_numbers * dtype.itemsize // _LINE_BYTES) * _LINE_BYTES
        if self._piece is None or taken > self._end - self._at:
            whole = -(-max(taken, PIECE_BYTES) // PAGE_BYTES) * PAGE_BYTES
            self._piece = mmap.mmap(-1, whole + PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a kernel without them
                self._piece.madvise(mmap.MADV_HUGEPAGE)
            address = torch.frombuffer(self._piece, dtype=torch.uint8).data_ptr()
            self._at = -address % PAGE_BYTES
            self._end = self._at + whole
        found = torch.frombuffer(self._piece, dtype=dtype, count=num_numbers, offset=self._at)
        self._at += taken
        return found
