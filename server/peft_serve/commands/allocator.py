"""The C library's allocator of a server's process: what a start frees goes back to the system.

glibc takes large pieces from the system one by one and gives each back when it is freed. What counts as large grows,
up to 32 MiB, with the pieces that are freed, and all that is smaller comes from heaps that keep what is freed: tensors
as they were read, and plain weights that were packed, as many bytes as the base has. So a start fixes the bound low,
and a server that runs fixes it where it would have grown to, since steps free and take pieces of the same sizes again
and again. A process-wide setting, made by whoever owns the process; other C libraries are left as they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_STARTING_BYTES: Final = 128 << 10  # glibc's own, before it grows
_RUNNING_BYTES: Final = 32 << 20  # where it ends


@contextmanager
def giving_back() -> Iterator[None]:
    """While this lasts, what is freed and not small goes back to the system; behind it, what is free has gone back."""
    library: Any = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(_M_MMAP_THRESHOLD, _STARTING_BYTES)
    try:
        yield
    finally:
        library.mallopt(_M_MMAP_THRESHOLD, _RUNNING_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * _RUNNING_BYTES)
        library.malloc_trim(0)
