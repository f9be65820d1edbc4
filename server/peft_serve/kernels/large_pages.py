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
        self._rest = torch.empty(0, dtype=torch.uint8)  # of the last piece

    def empty(self, num_numbers: int, dtype: torch.dtype) -> Tensor:
        """[num_numbers] that nobody has written, at the start of a cache line. Where nothing has been written, no
        memory is taken yet."""
        num_bytes = num_numbers * dtype.itemsize
        taken = -(-num_bytes // _LINE_BYTES) * _LINE_BYTES
        if taken > len(self._rest):
            self._rest = _piece(max(taken, PIECE_BYTES))
        found, self._rest = self._rest[:num_bytes], self._rest[taken:]
        return found.view(dtype)


def _piece(num_bytes: int) -> Tensor:
    """At least so many bytes, at the start of a large page."""
    whole = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
    if sys.platform == "linux":
        memory = mmap.mmap(-1, whole + PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        piece = torch.frombuffer(memory, dtype=torch.uint8)
        return piece[-piece.data_ptr() % PAGE_BYTES :][:whole]
    return torch.empty(whole, dtype=torch.uint8)
