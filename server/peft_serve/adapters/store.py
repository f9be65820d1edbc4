"""The store: uploaded checkpoints and the records of names, on a disk, whole or not at all.

    blobs/sha256/<hex>/   the files of one checkpoint and its manifest; never changed once it is there
    names/<stem>.json     the record of one name; replaced by rename
    quarantine/           blobs whose files stopped matching their digest; never read again
    pins.json             the versions that are to be kept on the device; replaced by rename
    tmp/                  what is being written; emptied at start
    lock                  held by the one process that writes

A write returns when it is durable: every file is synced, then its folder, then moved into place, then the
folder it was moved into is synced. Nothing else on the disk is the truth. One process writes; a store that this one
may not write to is read as it lies, without the lock: what is there never changes under its name, or changes whole.
The store knows bytes, digests and records; which version of a name is wanted, and when a blob is no longer needed, is
the catalog's business.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Final

from peft_serve.adapters.filesystem import FileSystem
from peft_serve.adapters.manifest import Manifest, decode_manifest, encode_manifest
from peft_serve.adapters.name_record import NameRecord
from peft_serve.adapters.names import file_stem, is_id, name_of_stem
from peft_serve.adapters.records import (
    CONFIG_FILE,
    HEAD_CONFIG_FILE,
    HEAD_WEIGHTS_FILE,
    PROFILE_FILE,
    WEIGHTS_FILE,
    CheckpointFiles,
)
from peft_serve.adapters.sealed import SealError, unseal
from peft_serve.adapters.store_folder import StoreFolder
from peft_serve.adapters.store_protocol import NO_NEWS, News
from peft_serve.adapters.store_words import damaged_record, told, unreadable_blob, unreadable_record
from peft_serve.adapters.vocabulary import VOCABULARY_FILES
from peft_serve.core import AdapterId
from peft_serve.errors import AdapterDamaged

MANIFEST_FILE: Final = "manifest.json"
PINS_FILE: Final = "pins.json"


def blob_folder(root: Path, adapter: AdapterId) -> Path:
    """Where a store keeps the files of a checkpoint. They never change, so anybody may read them."""
    assert is_id(adapter), "only the digest of files names a blob"
    return root / "blobs" / "sha256" / adapter.removeprefix("sha256:")


def record_file(root: Path, name: str) -> Path:
    """Where a store keeps the record of a name, sealed; it is replaced whole."""
    return root / "names" / f"{file_stem(name)}.json"


class AdapterStore:
    """Owner of one folder. Methods may be called from any thread; the catalog orders writes to one name.

    Checkpoints leave `min_free_bytes` of the disk alone, so that there is room for records: those of a delete, first of
    all.
    """

    def __init__(
        self,
        root: Path,
        fs: FileSystem,
        *,
        min_free_bytes: int = 0,
        writes: bool = True,
    ) -> None:
        """Without `writes` this process leaves the folder to the one that has its lock, and only reads."""
        self._fs = fs
        self._min_free_bytes = min_free_bytes
        self._on_detach: Callable[[AdapterId], None] = lambda _adapter: None
        self._root = root
        self._blobs = root / "blobs" / "sha256"
        self._names = root / "names"
        self._quarantine = root / "quarantine"
        self._damaged: set[AdapterId] = set()  # found damaged, and still lying there: the disk takes no writes
        self._folder = StoreFolder(root, fs, (self._blobs, self._names, self._quarantine), writes=writes)

    @property
    def is_read_only(self) -> bool:
        """Whether this process may only read what lies there; what would write raises Unavailable."""
        return self._folder.is_read_only

    @property
    def is_shared(self) -> bool:
        """This is the one process that writes."""
        return False

    def require_writable(self) -> None:
        """Raise Unavailable where this process may only read: before anything else is looked at for a change."""
        self._folder.require_writable()

    def told_first(self) -> AbstractContextManager[None]:
        """Whatever refuses a change in here, the store is asked first whether it can be written to; but where
        it is about who may, or there is nothing of the name."""
        return self._folder.told_first()

    def tell_of_detached(self, listener: Callable[[AdapterId], None]) -> None:
        """`listener` is told of each blob that is gone for good, and returns at once. To be said before the first."""
        self._on_detach = listener

    def tell_of_changes(self, listener: Callable[[], None]) -> None:
        """Nobody else reads what this process alone writes."""

    def close(self) -> None:
        """Let another process own the store."""
        self._folder.close()

    # blobs

    def put_blob(self, adapter: AdapterId, files: CheckpointFiles, manifest: Manifest) -> None:
        """Keep `files` as `adapter`, their digest; durable on return.

        One that is there already is checked against the digest and mended if it does not match. Raises
        StoreFull or Unavailable, and then nothing new is left.
        """
        assert adapter == files.digest(), "a blob's id is the digest of its files"
        with self._folder.writing():
            if self._is_there(adapter) and not self._is_intact(adapter):
                self._set_aside(adapter)
            if not self._is_there(adapter):
                self._write_blob(adapter, files, manifest)
            self._fs.sync_dir(self._blobs)
        self._damaged.discard(adapter)

    def _write_blob(self, adapter: AdapterId, files: CheckpointFiles, manifest: Manifest) -> None:
        contents = {**files.contents(), MANIFEST_FILE: encode_manifest(manifest)}
        needed = sum(len(content) for content in contents.values()) + self._min_free_bytes
        if self._fs.free_bytes(self._root) < needed:
            raise OSError(errno.ENOSPC, "what must stay free would be used")
        with self._folder.scratch() as folder:
            self._fs.make_dir(folder)
            for name, content in contents.items():
                self._fs.write(folder / name, content)
                self._fs.sync_file(folder / name)
            self._fs.sync_dir(folder)
            try:
                self._fs.rename(folder, self._blob(adapter))
            except OSError:
                if not self._is_there(adapter):  # a second upload of the same files may have come first
                    raise

    def has_blob(self, adapter: AdapterId) -> bool:
        """Whether a blob is there that nobody found damaged; raises Unavailable."""
        with told("read"):
            return adapter not in self._damaged and self._is_there(adapter)

    def _is_there(self, adapter: AdapterId) -> bool:
        return self._fs.is_dir(self._blob(adapter))

    def blob_ids(self) -> list[AdapterId]:
        """The ids of all blobs, by listing alone; raises Unavailable."""
        with told("read"):
            ids = [f"sha256:{name}" for name in self._fs.list_dir(self._blobs)]
        return [AdapterId(text) for text in ids if is_id(text)]

    def read_blob(self, adapter: AdapterId) -> CheckpointFiles:
        """The files of a blob, checked against its digest; raises AdapterDamaged and AdapterUnavailable.

        A blob that does not match goes to quarantine, where the disk lets it: the same upload mends it.
        """
        try:
            files = self._read_files(adapter)
            if files is not None and files.digest() == adapter:
                return files
            is_damaged = self._is_there(adapter) and not self._is_intact(adapter)  # or mended by an upload meanwhile
        except OSError as error:
            raise unreadable_blob() from error
        if is_damaged:
            self._give_up(adapter)
        raise AdapterDamaged("the adapter's files are damaged or missing; upload it again")

    def read_manifest(self, adapter: AdapterId) -> Manifest | None:
        """The manifest of a blob; None when it is missing or damaged, or the blob is."""
        if adapter in self._damaged:
            return None
        try:
            return decode_manifest(self._fs.read(self._blob(adapter) / MANIFEST_FILE))
        except (OSError, SealError):
            return None

    def detach_blob(self, adapter: AdapterId) -> Callable[[], None]:
        """Forget a blob that no record names, at once; gives the slow rest, which frees its bytes.

        A blob that cannot be moved stays: it costs room and nothing else.
        """
        resting = self._folder.fresh()
        if self.is_read_only:  # it is another process's to remove
            return lambda: None
        with suppress(OSError):
            self._fs.rename(self._blob(adapter), resting)

        def finish() -> None:
            self._folder.clear(resting)
            self._on_detach(adapter)

        return finish

    def _give_up(self, adapter: AdapterId) -> None:
        """Set a damaged blob aside, or remember that it is one where the disk takes no writes."""
        try:
            if self.is_read_only:
                raise OSError(errno.EROFS, "not this process's to move")
            self._set_aside(adapter)
        except OSError:
            self._damaged.add(adapter)

    def _set_aside(self, adapter: AdapterId) -> None:
        """Move a damaged blob out of the way; an earlier one of the same id is replaced."""
        resting = self._quarantine / self._blob(adapter).name
        self._fs.remove_tree(resting)
        self._fs.rename(self._blob(adapter), resting)
        self._fs.sync_dir(self._quarantine)
        self._fs.sync_dir(self._blobs)

    def _is_intact(self, adapter: AdapterId) -> bool:
        try:
            files = self._read_files(adapter)
        except OSError:
            return False
        return files is not None and files.digest() == adapter

    def _read_files(self, adapter: AdapterId) -> CheckpointFiles | None:
        """What lies there; None without the two files that every checkpoint has."""
        folder = self._blob(adapter)
        config, weights = self._read_if_there(folder / CONFIG_FILE), self._read_if_there(folder / WEIGHTS_FILE)
        if config is None or weights is None:
            return None
        vocabulary = {name: self._read_if_there(folder / name) for name in VOCABULARY_FILES}
        return CheckpointFiles(
            config=config,
            weights=weights,
            profile=self._read_if_there(folder / PROFILE_FILE),
            head_config=self._read_if_there(folder / HEAD_CONFIG_FILE),
            head_weights=self._read_if_there(folder / HEAD_WEIGHTS_FILE),
            vocabulary={name: content for name, content in vocabulary.items() if content is not None},
        )

    def _read_if_there(self, path: Path) -> bytes | None:
        try:
            return self._fs.read(path)
        except FileNotFoundError:
            return None

    def _blob(self, adapter: AdapterId) -> Path:
        return blob_folder(self._root, adapter)

    # records of names

    def names(self) -> list[str]:
        """The names that have a record, deleted ones too, by listing alone; raises Unavailable."""
        with told("read"):
            stems = [file[:-5] for file in self._fs.list_dir(self._names) if file.endswith(".json")]
        return [name for stem in stems if (name := name_of_stem(stem)) is not None]

    def read_name(self, name: str) -> NameRecord:
        """The record of a name, empty if there never was one; raises AdapterUnavailable if it cannot be read."""
        try:
            record = NameRecord.from_json(unseal(self._fs.read(record_file(self._root, name))))
        except FileNotFoundError:
            return NameRecord(name=name)
        except SealError as error:
            raise damaged_record(name) from error
        except OSError as error:
            raise unreadable_record(name) from error
        if record.name != name:
            raise damaged_record(name)
        return record

    def write_name(self, record: NameRecord, *, replaces: NameRecord | None = None) -> None:  # noqa: ARG002
        """Replace the record of a name, which nobody else did; durable on return. Raises StoreFull or Unavailable."""
        self._folder.replace(record_file(self._root, record.name), record.to_json())

    # pins

    def read_pins(self) -> dict[AdapterId, str]:
        """The versions to be kept on the device, with a name of each; raises Unavailable, and SealError if damaged."""
        with told("read"):
            document = self._read_if_there(self._root / PINS_FILE)
        if document is None:
            return {}
        pins = unseal(document).get("pins")
        if not isinstance(pins, dict) or not all(is_id(each) and isinstance(pins[each], str) for each in pins):
            raise SealError("not a list of pins")
        return {AdapterId(each): name for each, name in pins.items()}

    def write_pins(self, pins: Mapping[AdapterId, str], *, replaces: Mapping[AdapterId, str] | None = None) -> None:  # noqa: ARG002
        """Replace the list; durable on return. Raises StoreFull or Unavailable."""
        self._folder.replace(self._root / PINS_FILE, {"pins": dict(sorted(pins.items()))})

    def news(self) -> News:
        """Nobody else writes."""
        return NO_NEWS

    def tidy(self) -> int:
        """Blobs go with the last name that stands for them."""
        return 0
