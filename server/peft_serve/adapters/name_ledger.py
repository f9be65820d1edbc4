"""The records of names in memory, read from the store when they are first asked for.

Of a shared store they are read again when another process has changed them; until that is possible, what was known goes
on.
"""

from __future__ import annotations

import threading
from collections.abc import Collection

from peft_serve.adapters.name_record import NameRecord
from peft_serve.adapters.store_protocol import RecordMoved, Store
from peft_serve.core import AdapterId
from peft_serve.errors import ServeError


class NameLedger:
    """Owner of the records: what is here is what is on the disk, and on a shared one what was there when it was last
    looked at. Thread-safe; the catalog orders writes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()  # never held while the disk is read or written
        self._names = set(store.names())  # names with a record, deleted ones too, read or not
        self._records: dict[str, NameRecord] = {}  # those read
        self._num_writes = 0  # that ended, well or not, here or elsewhere
        self._owed: set[str] = set()  # names whose record is to be read again
        self._reading_again = threading.Lock()  # so that no earlier answer is taken for a later one

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

    def known_ids(self) -> frozenset[AdapterId]:
        """Every id that some record names which has been read."""
        with self._lock:
            return frozenset(adapter for record in self._records.values() for adapter in record.ids)

    def heard_of(self, names: Collection[str]) -> frozenset[str]:
        """Others may have changed these. Gives those whose record has to be read again, earlier ones among them; the
        rest are read when they are asked for."""
        with self._lock:
            self._names.update(names)
            self._num_writes += 1  # what is being read now may be older
            self._owed.update(name for name in names if name in self._records)
            return frozenset(self._owed)

    def refresh(self, name: str) -> None:
        """Read a record again if others may have changed it; raises AdapterUnavailable, and then what was known is."""
        if not self._store.is_shared:
            return
        with self._reading_again:
            while True:
                num_writes = self._num_writes
                with self._lock:
                    if name in self._records:
                        self._owed.add(name)  # until it is read
                record = self._store.read_name(name)
                with self._lock:
                    if self._num_writes != num_writes:
                        continue
                    self._owed.discard(name)
                    if record != NameRecord(name=name) or name in self._names:
                        self._names.add(name)
                        self._records[name] = record
                    return

    def write(self, record: NameRecord, *, replaces: NameRecord) -> None:
        """Replace a record, durably. After a write that failed the disk is asked again what is true. Raises
        RecordMoved, and reads it again, where another process was first."""
        with self._lock:
            self._names.add(record.name)
        try:
            self._store.write_name(record, replaces=replaces)
        except RecordMoved:
            self.refresh(record.name)
            raise
        except ServeError:
            if self._store.is_shared:
                with self._lock:
                    self._num_writes += 1
                    self._owed.add(record.name)
                raise
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
