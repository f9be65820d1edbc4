"""The records of names in a shared store: read, and replaced on condition of what they were.

names/<stem>.json   the record of one name, sealed
"""

from __future__ import annotations

import threading
from typing import Final

from peft_serve.adapters.name_record import NameRecord
from peft_serve.adapters.names import file_stem, name_of_stem
from peft_serve.adapters.sealed import SealError
from peft_serve.adapters.shared.bucket import Bucket
from peft_serve.adapters.shared.documents import Documents
from peft_serve.adapters.shared.words import out_of_reach, reached
from peft_serve.adapters.store_protocol import RecordMoved
from peft_serve.errors import AdapterUnavailable

FOLDER: Final = "names/"


def key_of(name: str) -> str:
    """Where the record of a name lies."""
    return f"{FOLDER}{file_stem(name)}.json"


def name_of(key: str) -> str | None:
    """The name whose record lies there; None if it is none's."""
    if not key.startswith(FOLDER) or not key.endswith(".json"):
        return None
    return name_of_stem(key.removeprefix(FOLDER).removesuffix(".json"))


class NameRecords:
    """Remembers what was read last of each record, with its tag. Thread-safe."""

    def __init__(self, bucket: Bucket, documents: Documents) -> None:
        self._bucket = bucket
        self._documents = documents
        self._lock = threading.Lock()
        self._tags: dict[str, str] = {}  # of every name that was listed, read or written, and so is known
        self._seen: dict[str, tuple[str | None, NameRecord]] = {}  # of those read or written; no tag: there is nothing

    def names(self) -> list[str]:
        """All that have a record; raises Unavailable."""
        tags = self._listed()
        with self._lock:
            self._tags = tags | self._tags
        return list(tags)

    def moved(self) -> frozenset[str]:
        """The names whose record is not the one that was listed, read or written last; raises Unavailable."""
        tags = self._listed()
        with self._lock:
            found = frozenset(name for name, tag in tags.items() if self._tags.get(name) != tag)
            self._tags.update(tags)
        return found

    def _listed(self) -> dict[str, str]:
        with reached("read"):
            found = self._bucket.tags(FOLDER)
        return {name: tag for key, tag in found.items() if (name := name_of(key)) is not None}

    def read(self, name: str) -> NameRecord:
        """The record as it lies there, empty if there never was one; raises AdapterUnavailable."""
        record, tag = self._read(name)
        with self._lock:
            if tag is not None:
                self._tags[name] = tag
        return record

    def _read(self, name: str) -> tuple[NameRecord, str | None]:
        try:
            found = self._documents.read(key_of(name))
        except OSError as error:
            raise out_of_reach(f"adapter '{name}': its record") from error
        record = NameRecord(name=name)
        if found is not None:
            if found.body is None:
                raise _damaged(name)
            try:
                record = NameRecord.from_json(found.body)
            except SealError as error:
                raise _damaged(name) from error
        if record.name != name:
            raise _damaged(name)
        tag = None if found is None else found.tag
        with self._lock:
            self._seen[name] = (tag, record)
        return record, tag

    def write(self, record: NameRecord, replaces: NameRecord | None) -> None:
        """Put `record` in the place of `replaces`; raises OSError, AdapterUnavailable and RecordMoved."""
        name = record.name
        with self._lock:
            seen = self._seen.get(name)
        if seen is None or (replaces is not None and seen[1] != replaces):
            self._read(name)
            with self._lock:
                seen = self._seen[name]
        if replaces is not None and seen[1] != replaces:
            raise RecordMoved(name)
        tag = self._documents.swap(key_of(name), record.to_json(), seen[0])
        if tag is None:
            raise RecordMoved(name)
        with self._lock:
            self._seen[name] = (tag, record)
            self._tags[name] = tag

    def all_now(self) -> list[NameRecord]:
        """Every record as it lies there now; those whose tag is the one that was seen are not read again. Nobody has
        learnt of them by that: what has moved is told by `moved`. Raises Unavailable and AdapterUnavailable."""
        found = []
        for name, tag in self._listed().items():
            with self._lock:
                seen = self._seen.get(name)
            found.append(seen[1] if seen is not None and seen[0] == tag else self._read(name)[0])
        return found


def _damaged(name: str) -> AdapterUnavailable:
    return AdapterUnavailable(
        f"adapter '{name}': its record in the adapter store is damaged; "
        "the operator can restore it from a backup, or remove it and upload the adapter again"
    )
