"""Lots: how much is done in one turn of an event loop, so that what else is due on it waits a bounded time.

What one thing costs hangs on the machine, and on who else wants the interpreter at that moment: so the time that turns
took lately decides. Knows neither the loop nor what is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

TURN_S: Final = 0.004
"""What a turn may take; a loop that is late by less than 20 ms has room for some of them, and for what is not ours."""


class Lot:
    """The size of the next lot: halved after a turn that was too long, larger by one after a short one.

    `clock` gives seconds. `turn` is called as each lot is begun, `rest` when there is none to follow.
    """

    def __init__(self, clock: Callable[[], float], *, most: int, turn_s: float = TURN_S) -> None:
        self._clock = clock
        self._most = most
        self._turn_s = turn_s
        self._began_s: float | None = None  # the lot before
        self.size = most

    def turn(self) -> None:
        """A lot begins; the one before, if there was one, has been worked off."""
        now_s = self._clock()
        if self._began_s is not None:
            took_s = now_s - self._began_s
            if took_s > self._turn_s:
                self.size = max(1, self.size // 2)
            elif took_s < self._turn_s / 2:
                self.size = min(self._most, self.size + 1)
        self._began_s = now_s

    def rest(self) -> None:
        """Nothing is left: the time until the next lot says nothing."""
        self._began_s = None
