"""What changes names: uploads, returns to earlier versions, deletes, and what a crash left behind.

Each change is checked in one order: who may, whether the store can be written to, what the caller knew (If-Match), what
stands in the way. It is made under one lock, once and whole, and is durable when the call returns; where other
processes write to the store too, it is decided on what they have made of the name. Asking is the catalog's. Knows
neither HTTP nor tensors; the gate is given to it. May be called from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime

from peft_serve.adapters.aliases import Aliases
from peft_serve.adapters.deciding import decided, look_again
from peft_serve.adapters.findings import Drafts, Inspection, Proof, Prove, manifest_of, rfc3339
from peft_serve.adapters.listing import Listing, Shelves
from peft_serve.adapters.name_record import NameRecord, Numbered
from peft_serve.adapters.names import check_name, is_name, unknown
from peft_serve.adapters.ownership import OPERATOR, Kept, Ownership, Publisher
from peft_serve.adapters.records import CheckpointFiles, Summary, Version
from peft_serve.core import AdapterId
from peft_serve.errors import AdapterUnavailable, Forbidden, PreconditionFailed, ServeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What an upload did to its name."""

    version: Version
    created: bool  # False: the name stood for these very files already
    previous: Version | None  # what the name stood for before
    proof: Proof = field(default_factory=Proof)  # files that a version of the name has already are not tried again


@dataclass(frozen=True, slots=True, kw_only=True)
class _Condition:
    """What the caller says about the name before the change; None and False: nothing."""

    if_match: str | None = None  # the value of an If-Match header
    create_only: bool = False


def etag(adapter: AdapterId) -> str:
    """The entity tag of a version, quotes included: `"sha256-<hex>"`."""
    return f'"{adapter.replace(":", "-")}"'


class Changes:
    """Owner of every change to adapters' names. `lock` orders them; `drafts` is the gate, which is told of each upload
    whether it took place."""

    def __init__(
        self,
        shelves: Shelves,
        aliases: Aliases,
        lock: AbstractContextManager[object],
        drafts: Drafts,
        *,
        checked_for: str,
        base_name: str,
        now: Callable[[], datetime],
    ) -> None:
        self._store = shelves.store
        self._names = shelves.names
        self._folders = shelves.folders
        self._findings = shelves.findings
        self._holds = shelves.holds
        self._listing = Listing(shelves)
        self._ownership = Ownership(shelves.names)
        self._aliases = aliases
        self._lock = lock
        self._drafts = drafts
        self._checked_for = checked_for
        self._base_name = base_name
        self._now = now

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
        condition = _Condition(if_match=if_match, create_only=create_only)
        with nullcontext() if dry_run else self._store.told_first():
            if not dry_run:
                look_again(self._names, name)
            self._require_own(name, publisher)
            if not dry_run:
                self._store.require_writable()
            found = self._drafts.draft(files)
            self._holds.hold(found.id)  # whoever deletes the name meanwhile takes what was made of the files too
            is_named = False
            try:
                self._check(name, condition)
                self._ownership.require_room(self._names.record(name), publisher, found.id, files.num_bytes)
                created_at = rfc3339(self._now())
                if dry_run:
                    return self._outcome(name, self._names.record(name), found.id, found.summary, created_at)
                published = self._kept(name, files, found, condition, created_at, prove, source, publisher)
                is_named = True
                return published
            finally:
                self._drafts.settle(found.id, is_named=is_named)
                self._holds.release(found.id)

    def _kept(
        self,
        name: str,
        files: CheckpointFiles,
        found: Inspection,
        condition: _Condition,
        created_at: str,
        prove: Prove | None,
        source: str,
        publisher: Publisher,
    ) -> Published:
        """Keep files that are held, and let the name stand for them."""
        try:
            self._store.put_blob(found.id, files, manifest_of(found, self._checked_for))
            is_new = found.id not in self._names.record(name).ids
            proof = prove(found) if prove is not None and is_new else Proof()

            def decide() -> Published:
                self._require_own(name, publisher)
                self._check(name, condition)
                return self._recorded(name, found, files.num_bytes, created_at, source, publisher)

            with self._lock:
                outcome = decided(decide)
            return replace(outcome, proof=proof)
        except ServeError:
            self._forget({found.id})
            raise

    def _recorded(
        self, name: str, found: Inspection, num_bytes: int, created_at: str, source: str, publisher: Publisher
    ) -> Published:
        """Let the name stand for files that are kept; under the lock."""
        record = self._names.record(name)
        self._ownership.require_room(record, publisher, found.id, num_bytes)
        outcome = self._outcome(name, record, found.id, found.summary, created_at)
        if outcome.created:
            owner = publisher.tenant
            published = record.published(found.id, created_at, source, owner=owner, num_bytes=num_bytes)
            self._names.write(published, replaces=record)
            outcome = replace(outcome, version=replace(outcome.version, source=source))
        self._holds.keep(found.id)
        self._findings.learn(found.id, manifest_of(found, self._checked_for))
        return outcome

    def require_own(self, name: str, publisher: Publisher) -> None:
        """Raise Forbidden where the name stands for something that `publisher` may not change, and Conflict where an
        alias has it."""
        with self._store.told_first():
            self._require_own(name, publisher)

    def _require_own(self, name: str, publisher: Publisher) -> None:
        if is_name(name):
            self._ownership.require_own(self._names.record(name), publisher, is_folder=name in self._folders)
            self._aliases.require_free(name)

    def kept(self, tenant: str) -> Kept:
        """What a tenant owns now; reads records."""
        return self._ownership.kept(tenant)

    def rollback(self, name: str, number: int) -> Version:
        """Make an earlier version what `name` stands for; raises as `Catalog.resolve` does, and what a write raises."""

        def decide() -> Numbered:
            record = self._names.record(name) if is_name(name) else NameRecord(name=name)
            version = record.numbered(number)
            if version is None:
                raise unknown(f"{name}@{number}")
            self._findings.accepted(name, version)
            if record.current != number:
                self._names.write(record.rolled_back(number), replaces=record)
            return version

        with self._store.told_first(), self._lock:
            look_again(self._names, name)
            version = decided(decide)
        return self._listing.version(name, version)

    def delete(
        self, name: str, *, force: bool = False, if_match: str | None = None, publisher: Publisher = OPERATOR
    ) -> int:
        """Delete an upload with all its versions; gives how many requests still run on them.

        Their files go when nothing holds or names them. Raises UnknownAdapter, Forbidden for a folder's, what a write
        raises, PreconditionFailed, and Conflict for the target of an alias of the publisher's, which `force` takes out.
        """

        def decide() -> int:
            if self._listing.get(name).is_folder:
                raise Forbidden(self._folders.why_kept(name))
            self._store.require_writable()
            self._check(name, _Condition(if_match=if_match))
            self._aliases.let_go(name, force=force, publisher=publisher)
            record = self._names.record(name)
            self._names.write(record.deleted(), replaces=record)
            in_flight = sum(self._holds.count(adapter) for adapter in record.ids)
            self._forget(record.ids)
            return in_flight

        with self._store.told_first(), self._lock:
            look_again(self._names, name)
            return decided(decide)

    def learn(self, names: Collection[str]) -> frozenset[AdapterId]:
        """Other processes may have changed these names. Gives what no name stands for any more that this process knows;
        a record that cannot be read just now stays what it was, and is read the next time."""
        gone: frozenset[AdapterId] = frozenset()
        for name in self._names.heard_of(names):
            with self._lock, suppress(AdapterUnavailable):
                before = self._names.peek(name)
                self._names.refresh(name)
                if before is not None:
                    gone |= before.ids - self._names.record(name).ids
        gone -= self._names.known_ids()
        if gone:
            self._forget(gone)
        return gone

    def collect(self) -> int:
        """Remove the blobs that no record names and nobody holds, as a crash can leave; reads all records. A shared
        store does that by itself, when others need them no more either."""
        if self._store.is_shared:
            return 0
        with suppress(AdapterUnavailable):
            self._names.named_ids()  # reads the records, so that the next line keeps no upload waiting for long
        return self._forget(frozenset(self._store.blob_ids()))

    def _check(self, name: str, condition: _Condition) -> None:
        if condition == _Condition():
            return
        version = self._names.record(name).current_version
        is_folder = version is None and name in self._folders
        if condition.create_only and (version is not None or is_folder):
            raise PreconditionFailed(
                f"adapter '{name}' exists already; leave If-None-Match out to publish a new version"
            )
        if condition.if_match is None:
            return
        current = self._folders.of(name).id if is_folder else None if version is None else version.id
        if not _matches(condition.if_match, current):
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
        with self._lock:
            try:
                named = self._names.known_ids() if self._store.is_shared else self._names.named_ids()
                gone = adapters - named
            except AdapterUnavailable:
                return 0
            for adapter in gone:
                self._findings.drop(adapter)
            return self._holds.forget(gone)


def _matches(if_match: str, current: AdapterId | None) -> bool:
    """RFC 9110, 13.1.1: `*` is anything that exists; else one of the tags, compared strongly."""
    if current is None:
        return False
    tags = [tag.strip() for tag in if_match.split(",")]
    return tags == ["*"] or etag(current) in tags
