"""Which adapters are to be kept on the device, as it is written down: digests, and the name each was pinned by.

A pin belongs to files, not to a name. It is on the disk before it is acknowledged, so that a restart keeps it; on a
store that is read-only it lasts as long as the process, and on a shared one it is every process's. Who keeps them on
the device, and how many there is room for, is not known here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from typing import Final

from peft_serve.adapters.sealed import SealError
from peft_serve.adapters.store_protocol import PinsMoved, Store
from peft_serve.core import AdapterId
from peft_serve.errors import ServeError, Unavailable

_LOG: Final = logging.getLogger(__name__)
_MAX_TRIES: Final = 100


class Pins:
    """Owner of the list. Thread-safe; every method may read or write the disk, and raises StoreFull and Unavailable."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()  # orders the writes
        self._pins: dict[AdapterId, str] | None = None  # None: not read yet
        self._told: dict[AdapterId, str] = {}  # of a shared store: those that `learn` told, or that were changed here

    def all(self) -> dict[AdapterId, str]:
        """The name that each was pinned by."""
        with self._lock:
            return dict(self._read())

    def add(self, adapter: AdapterId, name: str) -> None:
        """Durable on return."""
        self._change(lambda pins: {adapter: name} | pins)
        with self._lock:
            self._told[adapter] = name

    def remove(self, adapters: Collection[AdapterId]) -> None:
        """Durable on return; those that are not pinned are fine."""
        self._change(lambda pins: {adapter: name for adapter, name in pins.items() if adapter not in adapters})
        with self._lock:
            self._told = {adapter: name for adapter, name in self._told.items() if adapter not in adapters}

    def learn(self) -> tuple[dict[AdapterId, str], frozenset[AdapterId]]:
        """Other processes may have changed the list: what is pinned now and was not, and what is so no more."""
        with self._lock:
            now = self._read_again()
            before, self._told = self._told, dict(now)
            new = {adapter: name for adapter, name in now.items() if adapter not in before}
            return new, frozenset(before) - frozenset(now)

    def _read_again(self) -> dict[AdapterId, str]:
        """The list of a shared store as it is now; where that cannot be read it stays what it was."""
        before, self._pins = self._pins, None
        try:
            return self._read()
        except ServeError:
            self._pins = before
            raise

    def _change(self, change: Callable[[dict[AdapterId, str]], dict[AdapterId, str]]) -> None:
        with self._lock:
            for _ in range(_MAX_TRIES):
                try:
                    self._write(change(self._read_again() if self._store.is_shared else self._read()))
                    return
                except PinsMoved:
                    continue
            raise Unavailable("the list of pins is changed by others all the time; try again", retry_after_s=1.0)

    def _read(self) -> dict[AdapterId, str]:
        if self._pins is None:
            try:
                self._pins = self._store.read_pins()
            except SealError as error:  # nothing is lost that cannot be said again
                _LOG.warning("pins.json in the adapter store is damaged, so that nothing is pinned: %s", error)
                self._pins = {}
        return self._pins

    def _write(self, pins: dict[AdapterId, str]) -> None:
        if pins != self._read():
            if not self._store.is_read_only:
                self._store.write_pins(pins, replaces=self._read())
            self._pins = pins
