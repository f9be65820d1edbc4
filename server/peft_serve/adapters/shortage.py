"""Shortage: whether an error says that memory ran out."""

from __future__ import annotations

from errno import ENOMEM

import torch


def is_short_of_memory(error: BaseException) -> bool:
    """The host's memory or the device's; torch's allocator for CPUs has no type of its own for it."""
    if isinstance(error, OSError):
        return error.errno == ENOMEM  # pages that are mapped
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
