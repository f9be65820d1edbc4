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
        self._lock = threading.Lock()  # held for the reading of one record, never while one is written
        self._names = set(store.names())  # names with a record, deleted ones too, read or not
        self._records: dict[str, NameRecord] = {}  # those read

    def names(self) -> frozenset[str]:
        with self._lock:
            return frozenset(self._names)

    def record(self, name: str) -> NameRecord:
        """The record of a name, empty if there never was one; raises AdapterUnavailable if it is damaged."""
        with self._lock:
            if name not in self._names:
                return NameRecord(name=name)
            if name not in self._records:
                self._records[name] = self._store.read_name(name)
            return self._records[name]

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
                self._records.pop(record.name, None)
            raise
        with self._lock:
            self._records[record.name] = record

    def check(self) -> None:
        """Our own books."""
        with self._lock:
            assert self._records.keys() <= self._names, "a record without its name"
            assert all(name == record.name for name, record in self._records.items()), "a record misfiled"
