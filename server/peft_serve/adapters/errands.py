"""Errands: slow things done one after the other on a thread of their own, which is there while there are any.

Nobody waits for them but `settle`. An errand looks after its own failures. What errands do is not known here.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

Errand = Callable[[], None]

_LOG: Final = logging.getLogger(__name__)


class Errands:
    """A queue with at most one thread. Safe from any thread. `on_thread_start` runs on it first."""

    def __init__(self, *, name: str, on_thread_start: Errand = lambda: None) -> None:
        self._name = name
        self._on_thread_start = on_thread_start
        self._waiting: deque[Errand] = deque()
        self._is_running = False
        self._changed = threading.Condition()

    def put(self, errand: Errand) -> None:
        """Have it done soon."""
        with self._changed:
            self._waiting.append(errand)
            if self._is_running:
                return
            self._is_running = True
        # A daemon: what an errand has not written by the time the process ends was never promised to anybody.
        threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def settle(self, timeout_s: float) -> bool:
        """Wait until everything is done; False if it is not within that time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._is_running, timeout_s)

    def _run(self) -> None:
        self._do(self._on_thread_start)
        while True:
            with self._changed:
                if not self._waiting:
                    self._is_running = False
                    self._changed.notify_all()
                    return
                errand = self._waiting.popleft()
            self._do(errand)
            del errand  # with what it holds, which may be large

    def _do(self, errand: Errand) -> None:
        try:
            errand()
        except Exception:  # noqa: BLE001 (the ones behind it are still to be done)
            _LOG.exception("an errand of %s failed", self._name)
