"""The catalog: which adapter a name stands for, now and version by version.

It joins the store of uploads and the operator's read-only folders; an upload shadows a folder of the same name,
and deleting the upload uncovers it again. The folder's checkpoint is version 0 of its name: it is what lies
there now. Uploads count from 1, and no number is given twice.

It owns the records of names and the counts of requests that hold a version. It knows neither HTTP nor tensors;
the gate is given to it. Everything may be called from any thread; what may read a disk says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime

from peft_serve.adapters.alias_record import Target
from peft_serve.adapters.aliases import Aliases
from peft_serve.adapters.findings import FolderFindings, Inspect, Proof, Prove, StoreFindings, manifest_of, rfc3339
from peft_serve.adapters.folders import CheckpointFolders
from peft_serve.adapters.holds import BlobHolds
from peft_serve.adapters.listing import FOLDER_VERSION, Entry, Listing
from peft_serve.adapters.manifest import Manifest, resolved_as
from peft_serve.adapters.name_ledger import NameLedger
from peft_serve.adapters.name_record import NameRecord, Numbered
from peft_serve.adapters.names import AdapterRef, check_name, is_name, parse_ref, unknown
from peft_serve.adapters.ownership import OPERATOR, Kept, Ownership, Publisher
from peft_serve.adapters.pins import Pins
from peft_serve.adapters.records import CheckpointFiles, Resolved, Summary, Version
from peft_serve.adapters.store import AdapterStore
from peft_serve.core import BASE, AdapterId
from peft_serve.errors import AdapterUnavailable, Forbidden, PreconditionFailed, ServeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What an upload did to its name."""

    version: Version
    created: bool  # False: the name stood for these very files already
    previous: Version | None  # what the name stood for before
    proof: Proof = field(default_factory=Proof)  # files that a version of the name has already are not tried again


def etag(adapter: AdapterId) -> str:
    """The entity tag of a version, quotes included: `"sha256-<hex>"`."""
    return f'"{adapter.replace(":", "-")}"'


class Catalog:
    """Owner of names. `checked_for` tells for which base and rules the gate's findings hold."""

    def __init__(
        self,
        store: AdapterStore,
        folders: CheckpointFolders,
        inspect: Inspect,
        *,
        checked_for: str,
        base_name: str,
        now: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._inspect = inspect
        self._checked_for = checked_for
        self._base_name = base_name
        self._now = now
        self._names = NameLedger(store)
        self._ownership = Ownership(self._names)
        self._folders = FolderFindings(folders, inspect, checked_for)
        self._findings = StoreFindings(store, inspect, checked_for)
        self._holds = BlobHolds(store.detach_blob)
        self._listing = Listing(store, self._names, self._findings, self._folders, self._holds)
        self._writing = threading.RLock()  # one change of the records at a time
        self.pins = Pins(store)
        self.aliases = Aliases(
            self._names,
            self._writing,
            base_name=base_name,
            is_there=self._is_served,
            is_taken=self._folders.__contains__,
            now=lambda: rfc3339(self._now()),
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
                found = self._accepted(wanted.name, version)
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

    def _accepted(self, name: str, version: Numbered) -> Manifest:
        what = f"adapter '{name}' version {version.number}"
        try:
            finding = self._findings.of(version.id)
        except AdapterUnavailable as error:
            raise AdapterUnavailable(f"{what}: {error.message}", retry_after_s=error.retry_after_s) from error
        return finding.accepted(what)

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
        if self._store.has_blob(adapter) or not self._folders.has(adapter):
            try:
                return self._store.read_blob(adapter)
            except AdapterUnavailable:
                self._findings.drop(adapter)
                raise
        return self._folders.files(adapter)

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
        return self._store.has_blob(adapter) or self._folders.has(adapter)

    # changing

    def publish(
        self,
        name: str,
        files: CheckpointFiles,
        *,
        if_match: str | None = None,
        create_only: bool = False,
        dry_run: bool = False,
        prove: Prove | None = None,
        source: str = "",
        publisher: Publisher = OPERATOR,
    ) -> Published:
        """Make `files` what `name` stands for: once, whole, and durably before this returns, or not at all.

        `if_match` is the value of an If-Match header; `prove` tries new files out, once they are kept and before
        the name stands for them; `source` is recorded with a new version. Raises InvalidParameter (the name), what
        the gate and `prove` raise, Forbidden and StorageQuotaExceeded (the publisher), PreconditionFailed, StoreFull
        and Unavailable.
        """
        check_name(name, base_name=self._base_name)
        self.require_own(name, publisher)
        found = self._inspect(files)
        self._check_precondition(name, if_match=if_match, create_only=create_only)
        self._ownership.require_room(self._names.record(name), publisher, found.id, files.num_bytes)
        created_at = rfc3339(self._now())
        if dry_run:
            return self._outcome(name, self._names.record(name), found.id, found.summary, created_at)
        manifest = manifest_of(found, self._checked_for)
        self._holds.hold(found.id)
        try:
            self._store.put_blob(found.id, files, manifest)
            is_new = found.id not in self._names.record(name).ids
            proof = prove(found) if prove is not None and is_new else Proof()
            with self._writing:
                self.require_own(name, publisher)
                self._check_precondition(name, if_match=if_match, create_only=create_only)
                record = self._names.record(name)
                self._ownership.require_room(record, publisher, found.id, files.num_bytes)
                outcome = self._outcome(name, record, found.id, found.summary, created_at)
                if outcome.created:
                    owner, num_bytes = publisher.tenant, files.num_bytes
                    self._names.write(record.published(found.id, created_at, source, owner=owner, num_bytes=num_bytes))
                    outcome = replace(outcome, version=replace(outcome.version, source=source))
                self._holds.keep(found.id)
                self._findings.learn(found.id, manifest)
            return replace(outcome, proof=proof)
        except ServeError:
            self._forget({found.id})
            raise
        finally:
            self._holds.release(found.id)

    def require_own(self, name: str, publisher: Publisher) -> None:
        """Raise Forbidden where the name stands for something that `publisher` may not change."""
        if is_name(name):
            self.aliases.require_free(name)
            self._ownership.require_own(self._names.record(name), publisher, is_folder=name in self._folders)

    def kept(self, tenant: str) -> Kept:
        """What a tenant owns now; reads records."""
        return self._ownership.kept(tenant)

    def rollback(self, name: str, number: int) -> Version:
        """Make an earlier version what `name` stands for; raises as `resolve` does."""
        with self._writing:
            record = self._names.record(name) if is_name(name) else NameRecord(name=name)
            version = record.numbered(number)
            if version is None:
                raise unknown(f"{name}@{number}")
            self._accepted(name, version)
            if record.current != number:
                self._names.write(record.rolled_back(number))
        return self._listing.version(name, version)

    def delete(self, name: str, *, force: bool = False) -> int:
        """Delete an upload with all its versions; gives how many requests still run on them.

        Their files go when nothing holds or names them. Raises UnknownAdapter, Forbidden for a folder's, and Conflict
        for an alias' target, which `force` takes out of the alias.
        """
        with self._writing:
            entry = self.get(name)
            if entry.is_folder:
                raise Forbidden(
                    f"adapter '{name}' is served from a read-only folder; "
                    "take it out of the folder that --adapters names, and restart the server"
                )
            self.aliases.let_go(name, force=force)
            record = self._names.record(name)
            self._names.write(record.deleted())
            in_flight = sum(self._holds.count(adapter) for adapter in record.ids)
            self._forget(record.ids)
        return in_flight

    def collect(self) -> int:
        """Remove the blobs that no record names and nobody holds, as a crash can leave; reads all records."""
        with suppress(AdapterUnavailable):
            self._names.named_ids()  # reads the records, so that the next line keeps no upload waiting for long
        return self._forget(frozenset(self._store.blob_ids()))

    def check(self) -> None:
        """Our own books."""
        self._holds.check()
        self._names.check()

    def _check_precondition(self, name: str, *, if_match: str | None, create_only: bool) -> None:
        if if_match is None and not create_only:
            return
        version = self._names.record(name).current_version
        is_folder = version is None and name in self._folders
        if create_only and (version is not None or is_folder):
            raise PreconditionFailed(
                f"adapter '{name}' exists already; leave If-None-Match out to publish a new version"
            )
        if if_match is None:
            return
        current = self._folders.of(name).id if is_folder else None if version is None else version.id
        if not _matches(if_match, current):
            now = "does not exist" if current is None else f"is at {etag(current)}"
            raise PreconditionFailed(f"adapter '{name}' {now}, which If-Match does not name; look again")

    def _outcome(
        self, name: str, record: NameRecord, adapter: AdapterId, summary: Summary, created_at: str
    ) -> Published:
        current = record.current_version
        previous = self._listing.folder_version(name) if current is None else self._listing.version(name, current)
        created = current is None or current.id != adapter
        number = record.next_number if current is None or created else current.number
        version = Version(
            name=name,
            number=number,
            id=adapter,
            created=created_at if current is None or created else current.created,
            source="" if current is None or created else current.source,
            summary=summary,
        )
        return Published(version=version, created=created, previous=previous)

    def _forget(self, adapters: frozenset[AdapterId] | set[AdapterId]) -> int:
        """Let go of what no record names. If any record cannot be read, nothing: it might name them."""
        with self._writing:
            try:
                gone = adapters - self._names.named_ids()
            except AdapterUnavailable:
                return 0
            for adapter in gone:
                self._findings.drop(adapter)
            return self._holds.forget(gone)


def _picked(record: NameRecord, wanted: AdapterRef) -> Numbered | None:
    """The uploaded version that is meant, if there is one."""
    if wanted.number is not None:
        return record.numbered(wanted.number)
    return record.identified(wanted.id) if wanted.id is not None else record.current_version


def _matches(if_match: str, current: AdapterId | None) -> bool:
    """RFC 9110, 13.1.1: `*` is anything that exists; else one of the tags, compared strongly."""
    if current is None:
        return False
    tags = [tag.strip() for tag in if_match.split(",")]
    return tags == ["*"] or etag(current) in tags
