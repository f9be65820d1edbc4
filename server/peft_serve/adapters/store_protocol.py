"""What the catalog and its parts keep adapters in: files by their digest, records of names, and pins.

There are two kinds: a folder that one process writes to (`store.AdapterStore`) and a place that many do
(`shared.store.SharedStore`). A change of a record says which record it replaces; where another process was there first
it is `RecordMoved`, and whoever decided on the change decides again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol

from peft_serve.adapters.manifest import Manifest
from peft_serve.adapters.name_record import NameRecord
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.core import AdapterId


class RecordMoved(Exception):  # noqa: N818  # no error: somebody else was first
    """The record of a name is not the one that the change was to replace. Look again, and decide again."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the record of '{name}' was changed by another process")
        self.name = name


class PinsMoved(Exception):  # noqa: N818  # as above
    """The list of pins is not the one that was to be replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What other processes have changed."""

    names: frozenset[str] = frozenset()  # whose records may be others now
    has_pins: bool = False  # the list of pins may be another


NO_NEWS: Final = News()


class Store(Protocol):
    """Methods may be called from any thread, and may read and write slowly."""

    @property
    def is_read_only(self) -> bool:
        """Whether this process may only read what lies there; what would write raises Unavailable."""
        ...

    @property
    def is_shared(self) -> bool:
        """Whether other processes write too: what was read may have moved since, and `news` tells of it."""
        ...

    def require_writable(self) -> None:
        """Raise Unavailable where this process may only read: before anything else is looked at for a change."""
        ...

    def told_first(self) -> AbstractContextManager[None]:
        """Whatever refuses a change in here, the store is asked first whether it can be written to."""
        ...

    def tell_of_detached(self, listener: Callable[[AdapterId], None]) -> None:
        """`listener` is told of each blob that this process needs no more. To be said before the first."""
        ...

    def tell_of_changes(self, listener: Callable[[], None]) -> None:
        """`listener` is told whenever this process changed what other processes read too, and returns at once."""
        ...

    def close(self) -> None: ...

    def put_blob(self, adapter: AdapterId, files: CheckpointFiles, manifest: Manifest) -> None:
        """Keep `files` as `adapter`, their digest; durable on return. Raises StoreFull and Unavailable."""
        ...

    def has_blob(self, adapter: AdapterId) -> bool:
        """Whether a blob is there that nobody found damaged; raises Unavailable."""
        ...

    def blob_ids(self) -> list[AdapterId]:
        """The ids of all blobs; raises Unavailable."""
        ...

    def read_blob(self, adapter: AdapterId) -> CheckpointFiles:
        """The files of a blob, checked against its digest; raises AdapterDamaged and AdapterUnavailable."""
        ...

    def read_manifest(self, adapter: AdapterId) -> Manifest | None:
        """The manifest of a blob; None when it cannot be read, is missing or damaged, or the blob is."""
        ...

    def detach_blob(self, adapter: AdapterId) -> Callable[[], None]:
        """Forget a blob that no record names, at once; gives the slow rest."""
        ...

    def names(self) -> list[str]:
        """The names that have a record, deleted ones too; raises Unavailable."""
        ...

    def read_name(self, name: str) -> NameRecord:
        """The record of a name, empty if there never was one; raises AdapterUnavailable if it cannot be read."""
        ...

    def write_name(self, record: NameRecord, *, replaces: NameRecord | None = None) -> None:
        """Replace the record of a name; durable on return. Raises StoreFull and Unavailable, and RecordMoved where
        a shared store holds another than `replaces` (None: whatever is there)."""
        ...

    def read_pins(self) -> dict[AdapterId, str]:
        """The versions to be kept on the device, with a name of each; raises Unavailable, and SealError if damaged."""
        ...

    def write_pins(self, pins: Mapping[AdapterId, str], *, replaces: Mapping[AdapterId, str] | None = None) -> None:
        """Replace the list, as `write_name` does a record; PinsMoved where a shared store holds another."""
        ...

    def news(self) -> News:
        """What others changed since this was last asked, at the least; raises Unavailable."""
        ...

    def tidy(self) -> int:
        """Remove what nobody needs any more, as far as that is due; gives how many blobs went."""
        ...
