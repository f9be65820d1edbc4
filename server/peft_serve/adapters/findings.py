"""What the gate found in a checkpoint, asked for by the catalog's two sources: the store and the folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from peft_serve.adapters.folders import CheckpointFolders, FilesStamp
from peft_serve.adapters.manifest import Manifest
from peft_serve.adapters.name_record import Numbered
from peft_serve.adapters.once_each import OnceEach
from peft_serve.adapters.records import CheckpointFiles, Profile, Summary
from peft_serve.adapters.store_protocol import Store
from peft_serve.adapters.vocabulary import Vocabulary
from peft_serve.core import AdapterId
from peft_serve.errors import AdapterInvalid, AdapterUnavailable, MalformedUpload, Refusal

_MAX_REASONS = 3


class Inspection(Protocol):
    """What the gate gives for a checkpoint that it accepts."""

    @property
    def id(self) -> AdapterId: ...

    @property
    def summary(self) -> Summary: ...

    @property
    def profile(self) -> Profile: ...

    @property
    def cues(self) -> tuple[int, ...]:
        """Token ids without which a prompt shows nothing of it."""
        ...

    @property
    def vocabulary(self) -> Vocabulary: ...


Inspect = Callable[[CheckpointFiles], Inspection]
"""The gate: raises AdapterInvalid or MalformedUpload."""


class Drafts(Protocol):
    """The gate as uploads meet it: what it makes of one is a draft, until it is known whether a name stands for it."""

    def draft(self, files: CheckpointFiles) -> Inspection:
        """As `Inspect`; what does not raise owes one `settle`."""
        ...

    def settle(self, adapter: AdapterId, *, is_named: bool) -> None:
        """Keep what was made of it, or drop it: nothing is given up for an upload that is refused."""
        ...


class Gate(Drafts, Protocol):
    """The gate for all that comes."""

    def check(self, files: CheckpointFiles) -> Inspection:
        """As `Inspect`."""
        ...


@dataclass(frozen=True, slots=True)
class Undrafted:
    """A gate that makes nothing of an upload."""

    draft: Inspect

    def settle(self, adapter: AdapterId, *, is_named: bool) -> None:
        pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What came of trying a checkpoint out, when it is not refused for it."""

    is_tried: bool = False
    warnings: tuple[str, ...] = ()  # why it was not tried, or what is odd about its answers


Prove = Callable[[Inspection], Proof]
"""Try out a checkpoint whose files are kept and that no name stands for yet; slow. Raises AdapterInvalid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A checkpoint's id and either its manifest or the reasons why the base cannot serve it."""

    id: AdapterId
    manifest: Manifest | None = None
    refusal: str = ""
    reasons: tuple[Refusal, ...] = ()  # of a checkpoint that is whole and does not fit; none if it is broken

    def accepted(self, what: str) -> Manifest:
        """The manifest; raises AdapterInvalid, or AdapterUnavailable if it is broken. `what` names the adapter."""
        if self.reasons:
            raise AdapterInvalid(self.reasons, what=f"{what} does not fit the base model served here")
        if self.manifest is None:
            raise AdapterUnavailable(f"{what} cannot be read: {self.refusal}")
        return self.manifest


def rfc3339(moment: datetime) -> str:
    """A moment with a time zone as RFC 3339 writes it, in UTC, to the second."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def examine(files: CheckpointFiles, inspect: Inspect, checked_for: str) -> Finding:
    """Ask the gate about a checkpoint that is already here."""
    try:
        found = inspect(files)
    except AdapterInvalid as error:
        reasons = [f"{refusal.path}: {refusal.reason}" for refusal in error.errors[:_MAX_REASONS]]
        return Finding(id=files.digest(), refusal="; ".join(reasons), reasons=error.errors)
    except MalformedUpload as error:
        return Finding(id=files.digest(), refusal=error.message)
    return Finding(id=found.id, manifest=manifest_of(found, checked_for))


def manifest_of(found: Inspection, checked_for: str) -> Manifest:
    """What is kept of the gate's findings."""
    return Manifest(checked_for=checked_for, summary=found.summary, profile=found.profile, vocabulary=found.vocabulary)


class StoreFindings:
    """Findings about the store's blobs: from the manifest, or from the gate if that was for another base."""

    def __init__(self, store: Store, inspect: Inspect, checked_for: str) -> None:
        self._store = store
        self._inspect = inspect
        self._checked_for = checked_for
        self._findings: OnceEach[AdapterId, Finding] = OnceEach()

    def of(self, adapter: AdapterId) -> Finding:
        """May read the weights, once; raises AdapterUnavailable when the files are damaged or missing."""
        return self._findings.get(adapter, lambda: self._made(adapter))

    def accepted(self, name: str, version: Numbered) -> Manifest:
        """The manifest of a name's version; raises AdapterInvalid, and AdapterUnavailable as `of` does."""
        what = f"adapter '{name}' version {version.number}"
        try:
            finding = self.of(version.id)
        except AdapterUnavailable as error:
            raise AdapterUnavailable(f"{what}: {error.message}", retry_after_s=error.retry_after_s) from error
        return finding.accepted(what)

    def _made(self, adapter: AdapterId) -> Finding:
        manifest = self._store.read_manifest(adapter)
        if manifest is not None and manifest.checked_for == self._checked_for:
            return Finding(id=adapter, manifest=manifest)
        return examine(self._store.read_blob(adapter), self._inspect, self._checked_for)

    def summary(self, adapter: AdapterId) -> Summary | None:
        """The summary as far as it is known without reading weights."""
        known = self._findings.peek(adapter)
        if known is not None:
            return known.manifest.summary if known.manifest is not None else None
        manifest = self._store.read_manifest(adapter)
        if manifest is None or manifest.checked_for != self._checked_for:
            return None
        self._findings.put(adapter, Finding(id=adapter, manifest=manifest))
        return manifest.summary

    def is_known(self, adapter: AdapterId) -> bool:
        """Whether `of` would read nothing."""
        return self._findings.peek(adapter) is not None

    def learn(self, adapter: AdapterId, manifest: Manifest) -> None:
        """The gate has just said this about it."""
        self._findings.put(adapter, Finding(id=adapter, manifest=manifest))

    def drop(self, adapter: AdapterId) -> None:
        """The blob is gone or damaged."""
        self._findings.drop(adapter)


class FolderFindings:
    """Findings about read-only folders: made on first use, and again when the files' stamp changes."""

    def __init__(self, folders: CheckpointFolders, inspect: Inspect, checked_for: str) -> None:
        self._folders = folders
        self._inspect = inspect
        self._checked_for = checked_for
        self._findings: OnceEach[tuple[str, FilesStamp], Finding] = OnceEach()
        self._newest: dict[str, FilesStamp] = {}
        self._homes: dict[AdapterId, str] = {}

    def names(self) -> tuple[str, ...]:
        return self._folders.names()

    def __contains__(self, name: object) -> bool:
        return name in self._folders

    def why_kept(self, name: str) -> str:
        return self._folders.why_kept(name)

    def of(self, name: str) -> Finding:
        """May read the weights; raises AdapterUnavailable when the files cannot be read."""
        stamp = self._folders.stamp(name)
        finding = self._findings.get((name, stamp), lambda: self._made(name))
        before = self._newest.get(name)
        self._newest[name] = stamp
        if before is not None and before != stamp:
            self._findings.drop((name, before))
        return finding

    def _made(self, name: str) -> Finding:
        _, files = self._folders.read(name)
        finding = examine(files, self._inspect, self._checked_for)
        self._homes[finding.id] = name
        return finding

    def known(self, name: str) -> Finding | None:
        """The finding if it has been made, whatever the files are now; nothing is read."""
        stamp = self._newest.get(name)
        return None if stamp is None else self._findings.peek((name, stamp))

    def changed_at(self, name: str) -> str:
        """When the weights of a known finding were last changed: RFC 3339, UTC."""
        weights = self._newest[name][1]
        assert weights is not None, "what was found has weights"
        return rfc3339(datetime.fromtimestamp(weights[0] / 1e9, UTC))

    def has(self, adapter: AdapterId) -> bool:
        """Whether some folder held this checkpoint when it was last looked at."""
        return adapter in self._homes

    def home(self, adapter: AdapterId) -> str | None:
        """The folder that held this checkpoint when it was last looked at."""
        return self._homes.get(adapter)

    def expect(self, adapter: AdapterId, name: str) -> None:
        """Somebody else found this checkpoint in a folder of this name; `files` reads it there, and checks it."""
        if name in self._folders:
            self._homes.setdefault(adapter, name)

    def files(self, adapter: AdapterId) -> CheckpointFiles:
        """The files of a checkpoint that was found here; raises AdapterUnavailable if they changed since."""
        name = self._homes[adapter]
        _, files = self._folders.read(name)
        if files.digest() != adapter:
            raise AdapterUnavailable(
                f"adapter '{name}': its files changed on the disk after it was asked for; ask again"
            )
        return files
