"""Zeros that take no memory before something is written: on a CPU the system gives each page when it is touched first.

`torch.zeros` writes its zeros. A pool that is made for the longest contexts of the most rows would be in memory from
the start, whatever is asked of it.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor


def lazy_zeros(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.zeros`; on a CPU of pages that are not there yet."""
    num_bytes = math.prod(size) * dtype.itemsize
    if device.type != "cpu" or num_bytes == 0:
        return torch.zeros(*size, dtype=dtype, device=device)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # lives as long as the tensor
    return torch.frombuffer(pages, dtype=dtype).view(*size)
