"""The catalog: which adapter a name stands for, now and version by version.

It joins the store of uploads and the operator's read-only folders; an upload shadows a folder of the same name,
and deleting the upload uncovers it again. The folder's checkpoint is version 0 of its name: it is what lies
there now. Uploads count from 1, and no number is given twice.

It owns the records of names and the counts of requests that hold a version; `changes`, `pins` and `aliases` are its
parts. It knows neither HTTP nor tensors; the gate is given to it. Everything may be called from any thread; what may
read a disk says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime

from peft_serve.adapters.alias_record import Target
from peft_serve.adapters.aliases import Aliases
from peft_serve.adapters.changes import Changes
from peft_serve.adapters.findings import Drafts, FolderFindings, Inspect, StoreFindings, Undrafted, rfc3339
from peft_serve.adapters.folders import CheckpointFolders
from peft_serve.adapters.holds import BlobHolds
from peft_serve.adapters.listing import FOLDER_VERSION, Entry, Listing, Shelves
from peft_serve.adapters.manifest import resolved_as
from peft_serve.adapters.name_ledger import NameLedger
from peft_serve.adapters.name_record import NameRecord, Numbered
from peft_serve.adapters.names import AdapterRef, is_name, parse_ref, unknown
from peft_serve.adapters.pins import Pins
from peft_serve.adapters.records import CheckpointFiles, Resolved, Version
from peft_serve.adapters.store_protocol import Store
from peft_serve.core import BASE, AdapterId
from peft_serve.errors import AdapterUnavailable, ServeError, Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """What other processes did that concerns what this one has in memory."""

    gone: frozenset[AdapterId] = frozenset()  # adapters that no name stands for any more
    pinned: Mapping[AdapterId, str] = field(default_factory=dict)  # and a name of each
    unpinned: frozenset[AdapterId] = frozenset()


class Catalog:
    """Owner of names. `checked_for` tells for which base and rules the gate's findings hold."""

    def __init__(
        self,
        store: Store,
        folders: CheckpointFolders,
        inspect: Inspect,
        *,
        checked_for: str,
        base_name: str,
        now: Callable[[], datetime],
        drafts: Drafts | None = None,
    ) -> None:
        """`inspect` is the gate, `drafts` the gate for uploads if they are another matter to it."""
        self._store = store
        self._names = NameLedger(store)
        self._folders = FolderFindings(folders, inspect, checked_for)
        self._findings = StoreFindings(store, inspect, checked_for)
        self._holds = BlobHolds(store.detach_blob)
        shelves = Shelves(
            store=store, names=self._names, findings=self._findings, folders=self._folders, holds=self._holds
        )
        self._listing = Listing(shelves)
        writing = threading.RLock()  # one change of the records at a time
        self.pins = Pins(store)
        self._pins_moved = False  # by others, and not read since
        self.aliases = Aliases(
            self._names,
            writing,
            base_name=base_name,
            is_there=self._is_served,
            is_taken=self._folders.__contains__,
            now=lambda: rfc3339(now()),
            told_first=store.told_first,
        )
        self.changes = Changes(
            shelves,
            self.aliases,
            writing,
            drafts or Undrafted(inspect),
            checked_for=checked_for,
            base_name=base_name,
            now=now,
        )

    # asking

    def resolve(self, ref: str, *, hold: bool = False) -> Resolved:
        """What `name`, `name@3` or `name@sha256:...` stands for now. May read the disk when it is cold.

        With `hold` the version is retained before this returns, so that no delete comes between; the caller
        owes one `release`. Raises UnknownAdapter, AdapterInvalid and AdapterUnavailable.
        """
        wanted = parse_ref(ref)
        while True:
            version = _picked(self._names.record(wanted.name), wanted)
            if version is None:
                return self._resolved_folder(wanted, ref, hold=hold)
            self._holds.hold(version.id)
            try:
                if _picked(self._names.record(wanted.name), wanted) != version:
                    continue  # moved or deleted before the hold: look again
                found = self._findings.accepted(wanted.name, version)
                if hold:
                    self._holds.hold(version.id)
                return resolved_as(wanted.name, version.number, version.id, found)
            finally:
                self._holds.release(version.id)

    def is_at_hand(self, ref: str) -> bool:
        """Whether `resolve` would read nothing, as far as can be told without reading."""
        wanted = parse_ref(ref)
        record = self._names.peek(wanted.name)
        version = None if record is None else _picked(record, wanted)
        return version is not None and self._findings.is_known(version.id)

    def _resolved_folder(self, wanted: AdapterRef, ref: str, *, hold: bool) -> Resolved:
        if wanted.name not in self._folders or wanted.number not in (None, FOLDER_VERSION):
            raise unknown(ref)
        finding = self._folders.of(wanted.name)
        if wanted.id not in (None, finding.id):
            raise unknown(ref)
        found = finding.accepted(f"adapter '{wanted.name}'")
        if hold:
            self._holds.hold(finding.id)
        return resolved_as(wanted.name, FOLDER_VERSION, finding.id, found)

    def get(self, name: str) -> Entry:
        """A name as it is listed; reads records and manifests, never weights. Raises UnknownAdapter."""
        return self._listing.get(name)

    def list(self) -> tuple[Entry, ...]:
        """Every name that stands for something, sorted; reads records and manifests, never weights."""
        return self._listing.all()

    def versions(self, name: str) -> tuple[Version, ...]:
        """The versions of a name, oldest first; a folder's, once it is known, is number 0."""
        return self._listing.versions(name)

    def files(self, adapter: AdapterId) -> CheckpointFiles:
        """The files of an adapter, read whole and checked against its id; raises AdapterUnavailable."""
        if not self._folders.has(adapter) or self._is_kept(adapter):
            try:
                return self._store.read_blob(adapter)
            except AdapterUnavailable:
                self._findings.drop(adapter)
                raise
        return self._folders.files(adapter)

    # other processes

    @property
    def is_shared(self) -> bool:
        """Whether other processes write to the store too."""
        return self._store.is_shared

    def tidy(self) -> int:
        """Remove from a shared store what nobody needs any more, if that is due; gives how many blobs went."""
        return self._store.tidy()

    def follow(self) -> Followed:
        """Learn what other processes did to a shared store, as one does every second or so; raises Unavailable."""
        news = self._store.news()
        gone = self.changes.learn(news.names)
        self._pins_moved = self._pins_moved or news.has_pins
        if self._pins_moved:
            with suppress(ServeError):  # they are asked for again the next time; what is gone is told now
                pinned, unpinned = self.pins.learn()
                self._pins_moved = False
                return Followed(gone=gone, pinned=pinned, unpinned=unpinned)
        return Followed(gone=gone)

    def unnamed(self, adapters: frozenset[AdapterId]) -> frozenset[AdapterId]:
        """Those of them that no name stands for, as far as names were looked at."""
        return adapters - self._names.known_ids()

    def folder_of(self, adapter: AdapterId) -> str | None:
        """The read-only folder that an adapter was found in; None for uploads, and for what was not asked for yet."""
        return self._folders.home(adapter)

    def expect_in_folder(self, adapter: AdapterId, name: str) -> None:
        """Another process on the same folders found an adapter in this one: `files` is to look there."""
        self._folders.expect(adapter, name)

    # holding

    def retain(self, adapter: AdapterId) -> None:
        """A request that resolved `adapter` holds it until `release`; raises UnknownAdapter if it is gone."""
        if adapter != BASE and not self._holds.hold(adapter, lambda: self._is_there(adapter)):
            raise unknown(adapter)

    def release(self, adapter: AdapterId) -> None:
        """Give a hold back; the last hold on a deleted version frees its files."""
        if adapter != BASE:
            self._holds.release(adapter)

    def in_flight(self, adapter: AdapterId) -> int:
        return self._holds.count(adapter)

    def _is_served(self, target: Target) -> bool:
        record = self._names.record(target.adapter) if is_name(target.adapter) else NameRecord(name=target.adapter)
        if target.version is None and record.current is not None:
            return True
        is_folder = target.adapter in self._folders and target.version in (None, FOLDER_VERSION)
        return record.numbered(target.version) is not None or is_folder

    def _is_there(self, adapter: AdapterId) -> bool:
        return self._folders.has(adapter) or self._store.has_blob(adapter)

    def _is_kept(self, adapter: AdapterId) -> bool:
        """Whether the store has it, as far as can be told now."""
        try:
            return self._store.has_blob(adapter)
        except Unavailable:
            return False

    def check(self) -> None:
        """Our own books."""
        self._holds.check()
        self._names.check()


def _picked(record: NameRecord, wanted: AdapterRef) -> Numbered | None:
    """The uploaded version that is meant, if there is one."""
    if wanted.number is not None:
        return record.numbered(wanted.number)
    return record.identified(wanted.id) if wanted.id is not None else record.current_version
