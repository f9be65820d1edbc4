"""Watches that the base stays what it was: its weights are read again from time to time.

Nothing in the server writes to them; if anything ever does, every tenant's answers are wrong, those under way too: so
the server is told to end, and whoever started it starts it again with the weights as they are on disk.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from peft_serve.metrics import Metrics

_log = logging.getLogger(__name__)


class BaseWatch:
    """A thread that calls `check` every `interval_s` seconds, and `on_change` once when it says no."""

    def __init__(
        self, check: Callable[[], bool], on_change: Callable[[], None], metrics: Metrics, *, interval_s: float
    ) -> None:
        self._check = check
        self._on_change = on_change
        self._metrics = metrics
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._main, name="base-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Blocks until a check that runs is over."""
        self._stopped.set()
        self._thread.join()

    def _main(self) -> None:
        while not self._stopped.wait(self._interval_s):
            if not self._is_unchanged():
                _log.critical("the base's weights are not those the server was started with: it ends")
                self._metrics.set_base_ok(ok=False)
                self._on_change()
                return

    def _is_unchanged(self) -> bool:
        try:
            return self._check()
        except Exception:  # noqa: BLE001  # short of memory, say: nothing is known, and the next look may tell
            _log.exception("the base's weights could not be read")
            return True
