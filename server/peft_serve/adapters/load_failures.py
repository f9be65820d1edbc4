"""Loads that failed, remembered for a while, so that a broken adapter does not keep the disk busy.

Not thread-safe: whoever owns it has a lock.
"""

from __future__ import annotations

from collections.abc import Callable

from peft_serve.core import AdapterId


class LoadFailures:
    """Why adapters could not be loaded, for `ttl_s` seconds each. `clock` gives seconds that never go back."""

    def __init__(self, ttl_s: float, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._known: dict[AdapterId, tuple[float, Exception]] = {}  # until when, and why

    def get(self, adapter: AdapterId) -> Exception | None:
        """Why it could not be loaded, as long as that is remembered."""
        until_s, error = self._known.get(adapter, (0.0, None))
        return error if self._clock() < until_s else None

    def note(self, adapter: AdapterId, error: Exception) -> None:
        """It has just failed."""
        now_s = self._clock()
        self._known = {each: kept for each, kept in self._known.items() if now_s < kept[0]}
        self._known[adapter] = (now_s + self._ttl_s, error)

    def forget(self, adapter: AdapterId) -> None:
        """Let the next request try again."""
        self._known.pop(adapter, None)
