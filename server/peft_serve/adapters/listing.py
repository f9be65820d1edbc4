"""Names as they are listed: put together from records, manifests and counts; no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from peft_serve.adapters.findings import FolderFindings, StoreFindings
from peft_serve.adapters.holds import BlobHolds
from peft_serve.adapters.name_ledger import NameLedger
from peft_serve.adapters.name_record import Numbered
from peft_serve.adapters.names import is_name, unknown
from peft_serve.adapters.records import Version, VersionState
from peft_serve.adapters.store_protocol import Store
from peft_serve.errors import AdapterUnavailable

FOLDER_VERSION: Final = 0
"""The version number of what lies in a read-only folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A name as it is listed."""

    name: str
    version: Version | None  # the current one; None: a folder's checkpoint that nobody has used yet
    is_folder: bool  # served from a read-only folder
    num_versions: int
    in_flight: int  # requests that hold the current version
    problem: str = ""  # why it cannot be used, if that is known
    owner: str = ""  # the tenant that published it; empty: the operator


@dataclass(frozen=True, slots=True, kw_only=True)
class Shelves:
    """Where adapters are, what is known about them, and who holds them: the parts that asking and changing share."""

    store: Store
    names: NameLedger
    findings: StoreFindings
    folders: FolderFindings
    holds: BlobHolds


class Listing:
    """A view on the catalog's parts; it changes none of them."""

    def __init__(self, shelves: Shelves) -> None:
        self._store = shelves.store
        self._names = shelves.names
        self._findings = shelves.findings
        self._folders = shelves.folders
        self._holds = shelves.holds

    def get(self, name: str) -> Entry:
        """Raises UnknownAdapter."""
        entry = self._entry(name) if is_name(name) else None
        if entry is None:
            raise unknown(name)
        return entry

    def all(self) -> tuple[Entry, ...]:
        names = sorted(self._names.names().union(self._folders.names()))
        return tuple(entry for name in names if (entry := self._entry(name)) is not None)

    def versions(self, name: str) -> tuple[Version, ...]:
        """Raises UnknownAdapter, and AdapterUnavailable when the record is damaged."""
        self.get(name)
        uploads = tuple(self.version(name, numbered) for numbered in self._names.record(name).versions)
        below = self.folder_version(name)
        return uploads if below is None else (below, *uploads)

    def version(self, name: str, numbered: Numbered) -> Version:
        """An uploaded version; its summary is None when only reading the weights would tell."""
        is_there = self._store.has_blob(numbered.id)
        return Version(
            name=name,
            number=numbered.number,
            id=numbered.id,
            created=numbered.created,
            source=numbered.source,
            summary=self._findings.summary(numbered.id) if is_there else None,
            state=VersionState.ACTIVE if is_there else VersionState.QUARANTINED,
        )

    def folder_version(self, name: str) -> Version | None:
        """What a folder held when it was last used, if that was accepted."""
        finding = self._folders.known(name)
        if finding is None or finding.manifest is None:
            return None
        return Version(
            name=name,
            number=FOLDER_VERSION,
            id=finding.id,
            created=self._folders.changed_at(name),
            summary=finding.manifest.summary,
        )

    def _entry(self, name: str) -> Entry | None:
        try:
            record = self._names.record(name)
        except AdapterUnavailable as error:
            return _nothing_usable(name, is_folder=False, problem=error.message)
        current = record.current_version
        if current is not None:
            version = self.version(name, current)
            return self._usable(version, is_folder=False, num_versions=len(record.versions), owner=record.owner)
        return self._folder_entry(name) if name in self._folders else None

    def _folder_entry(self, name: str) -> Entry:
        version = self.folder_version(name)
        if version is not None:
            return self._usable(version, is_folder=True, num_versions=1)
        finding = self._folders.known(name)
        return _nothing_usable(name, is_folder=True, problem="" if finding is None else finding.refusal)

    def _usable(self, version: Version, *, is_folder: bool, num_versions: int, owner: str = "") -> Entry:
        quarantined = version.state is VersionState.QUARANTINED
        return Entry(
            name=version.name,
            version=version,
            is_folder=is_folder,
            num_versions=num_versions,
            in_flight=self._holds.count(version.id),
            problem="its files are damaged or missing; upload it again" if quarantined else "",
            owner=owner,
        )


def _nothing_usable(name: str, *, is_folder: bool, problem: str) -> Entry:
    return Entry(
        name=name,
        version=None,
        is_folder=is_folder,
        num_versions=1 if is_folder else 0,
        in_flight=0,
        problem=problem,
    )
