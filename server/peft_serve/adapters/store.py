"""The store: uploaded checkpoints and the records of names, on a disk, whole or not at all.

    blobs/sha256/<hex>/   the files of one checkpoint and its manifest; never changed once it is there
    names/<stem>.json     the record of one name; replaced by rename
    quarantine/           blobs whose files stopped matching their digest; never read again
    tmp/                  what is being written; emptied at start
    lock                  held by the one process that owns the store

A write returns when it is durable: every file is synced, then its folder, then moved into place, then the
folder it was moved into is synced. Nothing else on the disk is the truth. The store knows bytes, digests and
records; which version of a name is wanted, and when a blob is no longer needed, is the catalog's business.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
from peft_serve.adapters.sealed import SealError, seal, unseal
from peft_serve.adapters.vocabulary import VOCABULARY_FILES
from peft_serve.core import AdapterId
from peft_serve.errors import AdapterUnavailable, StoreFull, Unavailable

MANIFEST_FILE: Final = "manifest.json"

_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_RETRY_AFTER_S: Final = 30.0


def blob_folder(root: Path, adapter: AdapterId) -> Path:
    """Where a store keeps the files of a checkpoint. They never change, so anybody may read them."""
    assert is_id(adapter), "only the digest of files names a blob"
    return root / "blobs" / "sha256" / adapter.removeprefix("sha256:")


def record_file(root: Path, name: str) -> Path:
    """Where a store keeps the record of a name, sealed; it is replaced whole."""
    return root / "names" / f"{file_stem(name)}.json"


class AdapterStore:
    """Owner of one folder. Methods may be called from any thread; the catalog orders writes to one name.

    `on_detach` is told of each blob that is gone for good, and returns at once.
    """

    def __init__(
        self, root: Path, fs: FileSystem, *, on_detach: Callable[[AdapterId], None] = lambda _adapter: None
    ) -> None:
        self._fs = fs
        self._on_detach = on_detach
        self._root = root
        self._blobs = root / "blobs" / "sha256"
        self._names = root / "names"
        self._quarantine = root / "quarantine"
        self._tmp = root / "tmp"
        self._tmp_ids = itertools.count()
        with _told("opened"):
            fs.make_dir(root)
            self._unlock = self._lock(root / "lock")
            try:
                self._lay_out(root)
            except BaseException:
                self._unlock()
                raise

    def _lock(self, path: Path) -> Callable[[], None]:
        try:
            return self._fs.lock(path)
        except BlockingIOError:
            raise Unavailable(
                "the adapter store is in use by another server process; stop that one, "
                "or give this one a store of its own with --store"
            ) from None

    def _lay_out(self, root: Path) -> None:
        """Make the folders, durably, and sweep what a crash left half written."""
        self._fs.remove_tree(self._tmp)
        for path in (self._blobs, self._names, self._quarantine, self._tmp):
            self._fs.make_dir(path)
        for path in (self._blobs.parent, root, root.parent):
            self._fs.sync_dir(path)

    def close(self) -> None:
        """Let another process own the store."""
        self._unlock()

    # blobs

    def put_blob(self, adapter: AdapterId, files: CheckpointFiles, manifest: Manifest) -> None:
        """Keep `files` as `adapter`, their digest; durable on return.

        One that is there already is checked against the digest and mended if it does not match. Raises
        StoreFull or Unavailable, and then nothing new is left.
        """
        assert adapter == files.digest(), "a blob's id is the digest of its files"
        with _told("written"):
            if self.has_blob(adapter) and not self._is_intact(adapter):
                self._set_aside(adapter)
            if not self.has_blob(adapter):
                self._write_blob(adapter, files, manifest)
            self._fs.sync_dir(self._blobs)

    def _write_blob(self, adapter: AdapterId, files: CheckpointFiles, manifest: Manifest) -> None:
        contents = {**files.contents(), MANIFEST_FILE: encode_manifest(manifest)}
        with self._scratch() as folder:
            self._fs.make_dir(folder)
            for name, content in contents.items():
                self._fs.write(folder / name, content)
                self._fs.sync_file(folder / name)
            self._fs.sync_dir(folder)
            try:
                self._fs.rename(folder, self._blob(adapter))
            except OSError:
                if not self.has_blob(adapter):  # a second upload of the same files may have come first
                    raise

    def has_blob(self, adapter: AdapterId) -> bool:
        return self._fs.is_dir(self._blob(adapter))

    def blob_ids(self) -> list[AdapterId]:
        """The ids of all blobs, by listing alone."""
        ids = [f"sha256:{name}" for name in self._fs.list_dir(self._blobs)]
        return [AdapterId(text) for text in ids if is_id(text)]

    def read_blob(self, adapter: AdapterId) -> CheckpointFiles:
        """The files of a blob, checked against its digest; raises AdapterUnavailable.

        A blob that does not match goes to quarantine: the same upload mends it.
        """
        try:
            files = self._read_files(adapter)
        except FileNotFoundError:
            files = None
        except OSError as error:
            raise AdapterUnavailable(
                "the adapter's files cannot be read; the server's disk may be failing",
                retry_after_s=_RETRY_AFTER_S,
            ) from error
        if files is not None and files.digest() == adapter:
            return files
        if self.has_blob(adapter) and not self._is_intact(adapter):  # an upload may have mended it meanwhile
            with _told("written"):
                self._set_aside(adapter)
        raise AdapterUnavailable("the adapter's files are damaged or missing and were set aside; upload it again")

    def read_manifest(self, adapter: AdapterId) -> Manifest | None:
        """The manifest of a blob; None when it is missing or damaged."""
        try:
            return decode_manifest(self._fs.read(self._blob(adapter) / MANIFEST_FILE))
        except (OSError, SealError):
            return None

    def detach_blob(self, adapter: AdapterId) -> Callable[[], None]:
        """Forget a blob that no record names, at once; gives the slow rest, which frees its bytes.

        A blob that cannot be moved stays: it costs room and nothing else.
        """
        resting = self._tmp / str(next(self._tmp_ids))
        with suppress(OSError):
            self._fs.rename(self._blob(adapter), resting)

        def finish() -> None:
            self._clear(resting)
            self._on_detach(adapter)

        return finish

    def _set_aside(self, adapter: AdapterId) -> None:
        """Move a damaged blob out of the way; an earlier one of the same id is replaced."""
        resting = self._quarantine / self._blob(adapter).name
        self._fs.remove_tree(resting)
        self._fs.rename(self._blob(adapter), resting)
        self._fs.sync_dir(self._quarantine)
        self._fs.sync_dir(self._blobs)

    def _is_intact(self, adapter: AdapterId) -> bool:
        try:
            return self._read_files(adapter).digest() == adapter
        except OSError:
            return False

    def _read_files(self, adapter: AdapterId) -> CheckpointFiles:
        folder = self._blob(adapter)
        vocabulary = {name: self._read_if_there(folder / name) for name in VOCABULARY_FILES}
        return CheckpointFiles(
            config=self._fs.read(folder / CONFIG_FILE),
            weights=self._fs.read(folder / WEIGHTS_FILE),
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
        """The names that have a record, deleted ones too, by listing alone."""
        stems = (file[:-5] for file in self._fs.list_dir(self._names) if file.endswith(".json"))
        return [name for stem in stems if (name := name_of_stem(stem)) is not None]

    def read_name(self, name: str) -> NameRecord:
        """The record of a name, empty if there never was one; raises AdapterUnavailable if it is damaged."""
        try:
            record = NameRecord.from_json(unseal(self._fs.read(self._record(name))))
        except FileNotFoundError:
            return NameRecord(name=name)
        except (OSError, SealError) as error:
            raise _unreadable(name) from error
        if record.name != name:
            raise _unreadable(name)
        return record

    def write_name(self, record: NameRecord) -> None:
        """Replace the record of a name; durable on return. Raises StoreFull or Unavailable."""
        with _told("written"), self._scratch() as file:
            self._fs.write(file, seal(record.to_json()))
            self._fs.sync_file(file)
            self._fs.rename(file, self._record(record.name))
            self._fs.sync_dir(self._names)

    def _record(self, name: str) -> Path:
        return record_file(self._root, name)

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """A fresh path in tmp; whatever is there at the end is removed."""
        path = self._tmp / str(next(self._tmp_ids))
        try:
            yield path
        finally:
            self._clear(path)

    def _clear(self, path: Path) -> None:
        with suppress(OSError):  # the sweep at the next start gets what resists now
            if self._fs.is_dir(path):
                self._fs.remove_tree(path)
            elif self._fs.stamp(path) is not None:
                self._fs.remove_file(path)


def _unreadable(name: str) -> AdapterUnavailable:
    return AdapterUnavailable(
        f"adapter '{name}': its record on the server's disk is damaged; "
        "the operator can restore it from a backup, or remove it and upload the adapter again"
    )


@contextmanager
def _told(act: str) -> Iterator[None]:
    """Turn what the disk says into a refusal that may be shown."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StoreFull(
                "the adapter store has no room left; delete adapters that are not needed, or enlarge its disk"
            ) from error
        raise Unavailable(
            "the adapter store cannot be " + act + "; its disk may be failing or read-only",
            retry_after_s=_RETRY_AFTER_S,
        ) from error
