"""Memory that goes back to the system as soon as nothing lies in it any more.

What comes and goes by megabytes, adapters above all, would leave the heaps of an allocator full of holes, and a process
that keeps growing past what its adapters take.
"""

from __future__ import annotations

import mmap
from typing import Final

import torch
from torch import Tensor

_FEWEST_BYTES: Final = 256 << 10  # less is not worth pages of its own


def own_memory(num_numbers: int, dtype: torch.dtype) -> Tensor:
    """[num_numbers] on the host that nobody has set. MemoryError where the system has none."""
    num_bytes = num_numbers * dtype.itemsize
    if num_bytes < _FEWEST_BYTES:
        return torch.empty(num_numbers, dtype=dtype)
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no {num_bytes} bytes of memory") from error
    return torch.frombuffer(pages, dtype=dtype)  # which keeps the pages, and gives them back with its last view
