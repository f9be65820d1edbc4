"""A checkpoint's folder, wherever it is, and how its files are taken: only those that are read, and bounded before.

Owns the order of the work: look, choose, compare with the limits, read, look again. Where the folder is, is the
business of the module that made it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from peft_serve.adapters.archive import files_from_parts
from peft_serve.adapters.members import WANTED, UploadLimits
from peft_serve.adapters.records import (
    HEAD_CONFIG_FILE,
    HEAD_WEIGHTS_FILE,
    HUB_WEIGHTS_FILE,
    WEIGHTS_FILE,
    CheckpointFiles,
)
from peft_serve.errors import FetchFailed, MalformedUpload, PayloadTooLarge

_OF_HUB: Final = frozenset({HUB_WEIGHTS_FILE, HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE})


@dataclass(frozen=True, slots=True)
class Mark:
    """A file as a listing tells it."""

    num_bytes: int
    stamp: str  # differs when the content does: a time of change, an entity tag, a blob's id


class SourceFolder(Protocol):
    """One checkpoint's folder. Methods block, and raise ServeErrors that name the source and no path."""

    @property
    def provenance(self) -> str:
        """Where this is, as it is recorded: with the commit, if there is one. Known after the first `listing`."""
        ...

    def listing(self) -> Mapping[str, Mark]:
        """The files at its top as they are now, by name; raises NotFound."""
        ...

    def read(self, name: str, max_bytes: int, on_bytes: Callable[[int], None]) -> bytes:
        """A file, whole; `on_bytes` is told of each further lot, and may raise to give up.

        Of one that is larger than `max_bytes` no more is taken, and PayloadTooLarge raised."""
        ...


class Progress:
    """How far a fetch is, and where it is told to give up: `check` raises then. Read from any thread."""

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._check = check
        self._before = 0  # bytes of the files that are here whole
        self._size = 0  # of the file being read
        self.num_bytes = 0
        self.total_bytes: int | None = None

    def begin(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self._check()

    def begin_file(self, num_bytes: int) -> None:
        self._size = num_bytes
        self._check()

    def add(self, num_bytes: int) -> None:
        self.num_bytes = min(self.num_bytes + num_bytes, self._before + self._size)
        self._check()

    def end_file(self, num_bytes: int) -> None:
        self._before += num_bytes
        self.num_bytes = self._before


def fetch(folder: SourceFolder, limits: UploadLimits, progress: Progress) -> CheckpointFiles:
    """The checkpoint in `folder`, whole and as it is at one moment.

    Raises MalformedUpload for what is no checkpoint, PayloadTooLarge before anything is read, FetchFailed for one that
    changes meanwhile, and what the folder raises.
    """
    before = folder.listing()
    names = _chosen(before)
    _check_sizes(before, names, limits)
    progress.begin(sum(before[name].num_bytes for name in names))
    parts: dict[str, bytes | None] = dict.fromkeys(name for name in before if name not in names)
    for name in names:
        progress.begin_file(before[name].num_bytes)
        content = folder.read(name, limits.max_file_bytes(name), progress.add)
        progress.end_file(len(content))
        parts[name] = content
    after = folder.listing()
    if any(after.get(name) != before[name] for name in names) or set(_chosen(after)) != set(names):
        raise FetchFailed("the source changed while it was read; ask again when it is complete", retry_after_s=5.0)
    try:
        return files_from_parts(parts, limits=limits)
    except MalformedUpload as error:
        raise MalformedUpload(error.message.replace("the upload", "the folder", 1)) from error


def _chosen(listing: Mapping[str, Mark]) -> tuple[str, ...]:
    """The files that are read: of a folder with peft's weights nothing of AdapterHub's."""
    names = tuple(name for name in WANTED if name in listing)
    return tuple(name for name in names if name not in _OF_HUB) if WEIGHTS_FILE in names else names


def _check_sizes(listing: Mapping[str, Mark], names: tuple[str, ...], limits: UploadLimits) -> None:
    for name in names:
        limits.check_file(name, listing[name].num_bytes)
    total = sum(listing[name].num_bytes for name in names)
    most = limits.max_bytes + sum(limits.max_json_bytes for _ in names)
    if total > most + _vocabulary_bytes(listing, names, limits):
        raise PayloadTooLarge(f"the source's files have {total} bytes; this server accepts {most}")


def _vocabulary_bytes(listing: Mapping[str, Mark], names: tuple[str, ...], limits: UploadLimits) -> int:
    """What a tokenizer's files, which have bounds of their own, take beyond those of a small file."""
    small = limits.max_json_bytes
    return sum(max(0, listing[name].num_bytes - small) for name in names if not name.endswith(".safetensors"))
