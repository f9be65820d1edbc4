"""Another process' monotonic clock, as read here: times of day are not asked for, so nobody's need be right.

A message cannot arrive before it was sent. So of all messages the smallest (time here - time of sending there) is the
difference of the two clocks plus the shortest way, some tenths of a millisecond; one that waited in between is told
from it. Old ones are forgotten, as clocks drift.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

WINDOW_S: Final = 60.0


class FarClock:
    """One sender's clock. `note` what each message says; `here` translates. Used by one thread."""

    def __init__(self, clock: Callable[[], float], *, window_s: float = WINDOW_S) -> None:
        self._clock = clock
        self._window_s = window_s
        self._since_s = clock()
        self._smallest: float | None = None  # of this window
        self._smallest_before: float | None = None  # of the one before

    def note(self, sent_s: float) -> None:
        """A message came just now that was sent at `sent_s` of the far clock."""
        now = self._clock()
        if now - self._since_s > self._window_s:
            self._since_s, self._smallest_before, self._smallest = now, self._smallest, None
        difference = now - sent_s
        self._smallest = difference if self._smallest is None else min(self._smallest, difference)

    def here(self, far_s: float) -> float:
        """The time on this process' clock; a message was noted before."""
        known = [each for each in (self._smallest, self._smallest_before) if each is not None]
        assert known, "a clock that nobody spoke of cannot be translated"
        return far_s + min(known)
