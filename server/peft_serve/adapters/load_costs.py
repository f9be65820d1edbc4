"""Load costs: how long each adapter takes to load, as measured.

Owns one figure for each adapter that was loaded, up to a number of adapters. Of one that was never
loaded it says what its bytes would take at the mean speed of the others. Knows no adapter but by its id.
"""

from __future__ import annotations

import threading
from typing import Final

from peft_serve.core import AdapterId

_FIRST_GUESS_S: Final = 1e-9  # a byte, while nothing was measured
_FRESH: Final = 0.5  # weight of a new figure against those before


class LoadCosts:
    """Seconds by adapter. Thread-safe; `seconds` is what `eviction.CostAware` asks."""

    def __init__(self, *, max_adapters: int = 65_536) -> None:
        self._max_adapters = max_adapters
        self._lock = threading.Lock()
        self._seconds: dict[AdapterId, float] = {}  # the one measured longest ago first
        self._total_s = 0.0
        self._total_bytes = 0

    def measure(self, adapter: AdapterId, *, num_bytes: int, seconds: float) -> None:
        """A load of the adapter has succeeded, and took so long."""
        with self._lock:
            self._total_s += seconds
            self._total_bytes += num_bytes
            before = self._seconds.pop(adapter, seconds)
            self._seconds[adapter] = _FRESH * seconds + (1 - _FRESH) * before
            if len(self._seconds) > self._max_adapters:
                del self._seconds[next(iter(self._seconds))]

    def seconds(self, adapter: AdapterId, num_bytes: int) -> float:
        """What loading the adapter takes: as measured, else by its bytes."""
        with self._lock:
            known = self._seconds.get(adapter)
            if known is not None:
                return known
            return num_bytes * (self._total_s / self._total_bytes if self._total_bytes else _FIRST_GUESS_S)
