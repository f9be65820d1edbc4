"""Following what other processes do to a shared store: looks at short intervals, and what follows for the engine.

Names and records are the catalog's; here is when it looks, and that what was deleted elsewhere leaves this engine's
memory as it does after a delete of our own. A store that does not answer is asked again, and said once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from peft_serve.adapters.catalog import Catalog
from peft_serve.engine.client import EngineThread
from peft_serve.engine.letting_go import let_go
from peft_serve.engine.resuming import pin_all
from peft_serve.errors import ServeError

_LOG: Final = logging.getLogger(__name__)
_JITTER: Final = 0.5  # of the interval, around it: servers that were started together do not all ask together
_TIDY_S: Final = 60.0  # between two questions whether it is time to tidy; the store knows when it is


class StoreFollower:
    """Looks every `poll_s` on a thread of its own, and at once after `poke`. `draw` gives numbers from 0 to below 1."""

    def __init__(self, catalog: Catalog, engine: EngineThread, *, poll_s: float, draw: Callable[[], float]) -> None:
        self._catalog = catalog
        self._engine = engine
        self._poll_s = poll_s
        self._draw = draw
        self._is_poked = threading.Event()
        self._is_over = threading.Event()
        self._looking = threading.Lock()
        self._is_away = False  # the store does not answer
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to look, if other processes can change the store at all. The threads end with the process."""
        if self._catalog.is_shared and not self._threads:
            self._threads = [
                threading.Thread(target=self._follow, name="following", daemon=True),
                threading.Thread(target=self._tidy, name="tidying", daemon=True),
            ]
            for thread in self._threads:
                thread.start()

    def stop(self, timeout_s: float = 0.0) -> None:
        """Look no more; waits so long at most for a look that is under way."""
        self._is_over.set()
        self._is_poked.set()
        for thread in self._threads:
            thread.join(timeout_s)

    def poke(self) -> None:
        """Somebody has heard that the store changed: look now. Returns at once; safe from any thread."""
        self._is_poked.set()

    def look(self) -> bool:
        """Look once; whether the store answered."""
        with self._looking:
            try:
                followed = self._catalog.follow()
            except ServeError as error:
                if not self._is_away:
                    _LOG.warning("changes of other servers are not seen: %s%s", error.message, _why(error))
                self._is_away = True
                return False
            if self._is_away:
                _LOG.info("the adapter store answers again")
            self._is_away = False
            if followed.gone:
                let_go(self._engine, followed.gone)
            for adapter in followed.unpinned:
                self._engine.set_pinned(adapter, pinned=False)
            if followed.pinned:
                pin_all(self._catalog, self._engine, followed.pinned)
            return True

    def delay_s(self) -> float:
        """The time to the next look: at most a quarter above the interval."""
        return self._poll_s * (1 + _JITTER * (self._draw() - 0.5))

    def _follow(self) -> None:
        while not self._is_over.is_set():
            self._is_poked.clear()
            self.look()
            self._is_poked.wait(self.delay_s())

    def _tidy(self) -> None:
        while not self._is_over.wait(_TIDY_S):
            try:
                num_gone = self._catalog.tidy()
            except ServeError as error:
                _LOG.info("what no name stands for stays in the adapter store for now: %s", error.message)
                continue
            if num_gone:
                _LOG.info("removed the files of %d checkpoints that no name stands for", num_gone)


def _why(error: ServeError) -> str:
    """What the place itself said, for the operator: callers are not told."""
    cause = error.__cause__
    return f" ({cause.strerror})" if isinstance(cause, OSError) and cause.strerror else ""
