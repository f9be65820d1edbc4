"""Who still needs a blob: requests in flight hold it, and what nobody holds or names may go.

Counts only; which blobs a record names is told by the catalog, and what taking one away means by `detach`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable

from peft_serve.core import AdapterId

Detach = Callable[[AdapterId], Callable[[], None]]
"""Take a blob away at once (fast), and give the rest of the work (slow)."""


class BlobHolds:
    """Counts of holds by adapter id, and the ids that go with their last hold. Thread-safe."""

    def __init__(self, detach: Detach) -> None:
        self._detach = detach
        self._lock = threading.Lock()
        self._counts: Counter[AdapterId] = Counter()
        self._doomed: set[AdapterId] = set()

    def hold(self, adapter: AdapterId, is_there: Callable[[], bool] = lambda: True) -> bool:
        """Add a hold, unless the adapter is not there: then False. A held adapter stays."""
        with self._lock:
            if not self._counts[adapter] and not is_there():
                return False
            self._counts[adapter] += 1
            return True

    def release(self, adapter: AdapterId) -> None:
        """Give one hold back; the last one of an id that no record names takes its blob away."""
        finish = None
        with self._lock:
            assert self._counts[adapter] > 0, "a hold is given back exactly once"
            self._counts[adapter] -= 1
            if not self._counts[adapter]:
                del self._counts[adapter]
                if adapter in self._doomed:
                    self._doomed.discard(adapter)
                    finish = self._detach(adapter)
        if finish is not None:
            finish()

    def count(self, adapter: AdapterId) -> int:
        with self._lock:
            return self._counts.get(adapter, 0)

    def forget(self, adapters: Iterable[AdapterId]) -> int:
        """No record names these any more: they go now, or with their last hold. Gives how many went now."""
        finishes = []
        with self._lock:
            for adapter in adapters:
                if adapter in self._counts:
                    self._doomed.add(adapter)
                else:
                    finishes.append(self._detach(adapter))
        for finish in finishes:
            finish()
        return len(finishes)

    def keep(self, adapter: AdapterId) -> None:
        """A record names this one (again)."""
        with self._lock:
            self._doomed.discard(adapter)

    def check(self) -> None:
        """Our own books."""
        with self._lock:
            assert all(count > 0 for count in self._counts.values()), "a count of nothing"
            assert self._doomed <= self._counts.keys(), "what nobody holds is gone already"
