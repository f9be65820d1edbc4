"""Read-only folders of checkpoints, served where they lie.

A folder given by the operator is a checkpoint itself, or holds one in each sub-folder; the folder's name is the
adapter's. They are found by listing alone: no file is opened before an adapter is first used. What is on the
disk then is the truth; a stamp of the files tells when it changed. Whether a checkpoint is any good is for the
catalog to ask.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from peft_serve.adapters.filesystem import FileSystem, Stamp
from peft_serve.adapters.names import check_name, shown
from peft_serve.adapters.records import (
    CONFIG_FILE,
    HEAD_CONFIG_FILE,
    HEAD_WEIGHTS_FILE,
    HUB_WEIGHTS_FILE,
    PROFILE_FILE,
    WEIGHTS_FILE,
    CheckpointFiles,
)
from peft_serve.adapters.saved_tokenizer import Reduction
from peft_serve.adapters.vocabulary import MAX_BYTES, vocabulary_files
from peft_serve.errors import AdapterUnavailable, InvalidParameter, MalformedUpload

FilesStamp = tuple[Stamp | None, ...]
"""The stamps of a checkpoint's files, in a fixed order; None for one that is not there."""

_FILES = (CONFIG_FILE, WEIGHTS_FILE, PROFILE_FILE, *MAX_BYTES)
_HUB_FILES = (CONFIG_FILE, HUB_WEIGHTS_FILE, PROFILE_FILE, HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE, *MAX_BYTES)
_BEING_WRITTEN_RETRY_S = 1.0


class CheckpointFolders:
    """Names and places of the checkpoints that the operator's folders hold.

    `problems` are sentences about what was passed over, for the log. Thread-safe: only what it remembers of tokenizers
    changes after the start.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        fs: FileSystem,
        *,
        base_name: str,
        max_bytes: int = 512 << 20,
        shipped: Path | None = None,
    ) -> None:
        """`shipped` is the one of `folders` that comes with a demo base and that no operator named."""
        self._fs = fs
        self._shipped = None if shipped is None else shipped.absolute()
        self._max_bytes = max_bytes
        self._reduced = Reduction()
        self._places: dict[str, Path] = {}
        problems: list[str] = []
        for folder in folders:
            for place in self._found_in(folder.absolute(), problems):
                self._register(place, base_name, problems)
        self.problems = tuple(problems)

    def _found_in(self, folder: Path, problems: list[str]) -> Iterable[Path]:
        if self._is_checkpoint(folder):
            return [folder]
        try:
            found = [folder / name for name in self._fs.list_dir(folder)]
        except OSError:
            problems.append(f"--adapters: folder '{folder.name}' cannot be listed; check the path")
            return []
        found = [place for place in found if self._is_checkpoint(place)]
        if not found:
            problems.append(
                f"--adapters: folder '{folder.name}' holds no checkpoint; "
                f"each of its sub-folders with an {CONFIG_FILE} would be one"
            )
        return found

    def _is_checkpoint(self, place: Path) -> bool:
        return self._fs.stamp(place / CONFIG_FILE) is not None

    def _register(self, place: Path, base_name: str, problems: list[str]) -> None:
        try:
            name = check_name(place.name, base_name=base_name)
        except InvalidParameter as refusal:
            problems.append(f"--adapters: passed over: {refusal.message}")
            return
        if name in self._places:
            problems.append(f"--adapters: passed over: a second folder named {shown(name)}; the first is served")
        else:
            self._places[name] = place

    def _names_of(self, place: Path) -> tuple[str, ...]:
        """The files of a checkpoint, config and weights first: peft's, or AdapterHub's where only these are there."""
        is_hub = self._fs.stamp(place / WEIGHTS_FILE) is None and self._fs.stamp(place / HUB_WEIGHTS_FILE) is not None
        return _HUB_FILES if is_hub else _FILES

    def names(self) -> tuple[str, ...]:
        return tuple(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def why_kept(self, name: str) -> str:
        """Why an adapter cannot be deleted here, and what can be done."""
        if self._places[name].parent == self._shipped:
            return (
                f"adapter '{name}' ships with the demo base and cannot be deleted; "
                "upload one of its name to take its place, or serve a base of your own"
            )
        return (
            f"adapter '{name}' is served from a read-only folder; "
            "take it out of the folder that --adapters names, and restart the server"
        )

    def stamp(self, name: str) -> FilesStamp:
        """The stamp of the files as they are now; raises AdapterUnavailable when one is gone."""
        place = self._places[name]
        try:
            files = self._names_of(place)
            stamp = tuple(self._fs.stamp(place / file) for file in files)
        except OSError as error:
            raise _unreadable(name) from error
        for file, found in zip(_FILES[:2], stamp[:2], strict=True):
            if found is None:
                raise AdapterUnavailable(f"adapter '{name}': its folder holds no {file}; put it back")
        return stamp

    def read(self, name: str) -> tuple[FilesStamp, CheckpointFiles]:
        """The files, whole, and their stamp; raises AdapterUnavailable."""
        stamp = self.stamp(name)
        num_bytes = sum(found[1] for found in stamp if found is not None)
        if num_bytes > self._max_bytes:
            raise AdapterUnavailable(
                f"adapter '{name}': its files have {num_bytes} bytes; "
                f"this server was started with --max-adapter-bytes {self._max_bytes}"
            )
        place = self._places[name]
        try:
            names = self._names_of(place)
            there = zip(names, stamp, strict=False)
            contents = {file: self._fs.read(place / file) for file, found in there if found is not None}
            files = CheckpointFiles(
                config=contents[CONFIG_FILE],
                weights=contents[names[1]],
                profile=contents.get(PROFILE_FILE),
                head_config=contents.get(HEAD_CONFIG_FILE),
                head_weights=contents.get(HEAD_WEIGHTS_FILE),
                vocabulary=vocabulary_files(contents, self._reduced),
            )
        except OSError as error:
            raise _unreadable(name) from error
        except MalformedUpload as error:
            raise AdapterUnavailable(f"adapter '{name}': {error.message}") from error
        if self.stamp(name) != stamp:
            raise AdapterUnavailable(
                f"adapter '{name}': its files are being written; ask again when they are complete",
                retry_after_s=_BEING_WRITTEN_RETRY_S,
            )
        return stamp, files


def _unreadable(name: str) -> AdapterUnavailable:
    return AdapterUnavailable(f"adapter '{name}': its files cannot be read; check that the server may read its folder")
