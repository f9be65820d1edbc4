"""The records of names in memory, read from the store when they are first asked for."""

from __future__ import annotations

import threading

from peft_serve.adapters.name_record import NameRecord
from peft_serve.adapters.store import AdapterStore
from peft_serve.core import AdapterId
from peft_serve.errors import ServeError


class NameLedger:
    """Owner of the records: what is here is what is on the disk. Thread-safe; the catalog orders writes."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._lock = threading.Lock()  # never held while the disk is read or written
        self._names = set(store.names())  # names with a record, deleted ones too, read or not
        self._records: dict[str, NameRecord] = {}  # those read
        self._num_writes = 0  # that ended, well or not

    def names(self) -> frozenset[str]:
        with self._lock:
            return frozenset(self._names)

    def record(self, name: str) -> NameRecord:
        """The record of a name, empty if there never was one; raises AdapterUnavailable if it cannot be read."""
        while True:
            num_writes, known = self._num_writes, self.peek(name)
            if known is not None:
                return known
            read = self._store.read_name(name)
            with self._lock:
                if self._num_writes == num_writes:  # else it may be what a write has replaced
                    return self._records.setdefault(name, read)

    def peek(self, name: str) -> NameRecord | None:
        """The record if nothing must be read for it."""
        with self._lock:
            return self._records.get(name) if name in self._names else NameRecord(name=name)

    def named_ids(self) -> frozenset[AdapterId]:
        """Every id that some record names; reads all records, raises AdapterUnavailable if one is damaged."""
        return frozenset(adapter for name in self.names() for adapter in self.record(name).ids)

    def write(self, record: NameRecord) -> None:
        """Replace a record, durably. After a write that failed the disk is asked again what is true."""
        with self._lock:
            self._names.add(record.name)
        try:
            self._store.write_name(record)
        except ServeError:
            with self._lock:
                self._num_writes += 1
                self._records.pop(record.name, None)
            raise
        with self._lock:
            self._num_writes += 1
            self._records[record.name] = record

    def check(self) -> None:
        """Our own books."""
        with self._lock:
            assert self._records.keys() <= self._names, "a record without its name"
            assert all(name == record.name for name, record in self._records.items()), "a record misfiled"
