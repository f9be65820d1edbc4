"""Which adapters are to be kept on the device, as it is written down: digests, and the name each was pinned by.

A pin belongs to files, not to a name. It is on the disk before it is acknowledged, so that a restart keeps it; on a
store that is read-only it lasts as long as the process. Who keeps them on the device, and how many there is room for,
is not known here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from typing import Final

from peft_serve.adapters.sealed import SealError
from peft_serve.adapters.store import AdapterStore
from peft_serve.core import AdapterId

_LOG: Final = logging.getLogger(__name__)


class Pins:
    """Owner of the list. Thread-safe; every method may read or write the disk, and raises StoreFull and Unavailable."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._lock = threading.Lock()  # orders the writes
        self._pins: dict[AdapterId, str] | None = None  # None: not read yet

    def all(self) -> dict[AdapterId, str]:
        """The name that each was pinned by."""
        with self._lock:
            return dict(self._read())

    def add(self, adapter: AdapterId, name: str) -> None:
        """Durable on return."""
        with self._lock:
            self._write({adapter: name} | self._read())

    def remove(self, adapters: Collection[AdapterId]) -> None:
        """Durable on return; those that are not pinned are fine."""
        with self._lock:
            self._write({adapter: name for adapter, name in self._read().items() if adapter not in adapters})

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
                self._store.write_pins(pins)
            self._pins = pins
