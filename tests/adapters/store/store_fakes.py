"""Stand-ins for the parts around the store: a gate, a clock, and file systems that fail or lose power."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from peft_serve.adapters.catalog import Catalog
from peft_serve.adapters.filesystem import DiskFileSystem, Stamp
from peft_serve.adapters.folders import CheckpointFolders
from peft_serve.adapters.manifest import Manifest
from peft_serve.adapters.records import CONFIG_FILE, WEIGHTS_FILE, CheckpointFiles, Profile, Summary
from peft_serve.adapters.store import AdapterStore
from peft_serve.adapters.vocabulary import Vocabulary
from peft_serve.core import AdapterId
from peft_serve.errors import AdapterInvalid, Refusal

NOON = datetime(2026, 1, 2, 12, 0, tzinfo=UTC)


def checkpoint(seed: int = 0, *, peft_type: str = "LORA", profile: bytes | None = None) -> CheckpointFiles:
    config = json.dumps({"peft_type": peft_type, "seed": seed}).encode()
    return CheckpointFiles(config=config, weights=b"weights %d" % seed * 5, profile=profile)


@dataclass(frozen=True)
class Accepted:
    id: AdapterId
    summary: Summary
    profile: Profile
    vocabulary: Vocabulary = field(default_factory=Vocabulary)


class FakeGate:
    """Accepts what says LORA; `calls` counts how often weights were looked at."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, files: CheckpointFiles) -> Accepted:
        self.calls += 1
        peft_type = json.loads(files.config)["peft_type"]
        if peft_type != "LORA":
            raise AdapterInvalid([Refusal("peft_type", f"{peft_type} is not known here")])
        profile = Profile(template="Q: {text}", choices={"b": "2", "a": "1"}, labels=("b", "a"))
        return Accepted(files.digest(), summary_of(files), profile)


def summary_of(files: CheckpointFiles) -> Summary:
    return Summary(
        peft_type="LORA",
        task_type=None,
        base="demo",
        rank=4,
        num_bytes=files.num_bytes,
        num_tensors=2,
        num_sites=1,
        modules=("q_proj",),
        warnings=("one",),
        num_virtual_tokens=3,
    )


def manifest_of(files: CheckpointFiles) -> Manifest:
    return Manifest(checked_for="demo", summary=summary_of(files), profile=Profile(parameters={"seed": 1}))


class UnsyncedFileSystem(DiskFileSystem):
    """The real one without waiting for the disk, which tests about other things need not do."""

    def sync_file(self, path: Path) -> None:
        assert path.is_file(), "only what is there can be synced"

    def sync_dir(self, path: Path) -> None:
        assert path.is_dir(), "only what is there can be synced"


class Crash(BaseException):
    """The process dies here."""


class FaultyFileSystem(UnsyncedFileSystem):
    """Fails the n-th act that changes the disk (`fails_at`, counted from 0) and, if it is a crash, all after."""

    def __init__(self, fails_at: int, fault: BaseException) -> None:
        self.num_acts = 0
        self.fails_at = fails_at
        self.fault = fault

    def _act(self) -> None:
        self.num_acts += 1
        is_crash = isinstance(self.fault, Crash)
        if self.num_acts == self.fails_at + 1 or (is_crash and self.num_acts > self.fails_at):
            raise self.fault

    def write(self, path: Path, content: bytes) -> None:
        try:
            self._act()
        except OSError:
            path.write_bytes(content[: len(content) // 2])  # a full disk takes a part
            raise
        super().write(path, content)

    def make_dir(self, path: Path) -> None:
        self._act()
        super().make_dir(path)

    def sync_file(self, path: Path) -> None:
        self._act()
        super().sync_file(path)

    def sync_dir(self, path: Path) -> None:
        self._act()
        super().sync_dir(path)

    def rename(self, old: Path, new: Path) -> None:
        self._act()
        super().rename(old, new)

    def link(self, old: Path, new: Path) -> None:
        self._act()
        super().link(old, new)

    def remove_file(self, path: Path) -> None:
        if isinstance(self.fault, Crash):
            self._act()
        super().remove_file(path)

    def remove_tree(self, path: Path) -> None:
        if isinstance(self.fault, Crash):
            self._act()
        super().remove_tree(path)


def no_room() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@dataclass(frozen=True)
class Act:
    """One line of the write log."""

    kind: str  # make_dir, write, sync_file, sync_dir, rename, remove, acknowledge
    path: str
    other: str = ""
    content: bytes = b""


class LoggingFileSystem(DiskFileSystem):
    """Writes for real and keeps the log, from which `DiskAfterPowerLoss` rebuilds what a crash leaves."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log: list[Act] = []

    def _add(self, kind: str, path: Path, other: Path | None = None, content: bytes = b"") -> None:
        def relative(path: Path) -> str:
            return os.path.relpath(path, self.root)

        self.log.append(Act(kind, relative(path), relative(other) if other else "", content))

    def make_dir(self, path: Path) -> None:
        for folder in (*reversed(path.parents), path):
            if not folder.exists():
                self._add("make_dir", folder)
        super().make_dir(path)

    def write(self, path: Path, content: bytes) -> None:
        super().write(path, content)
        self._add("write", path, content=content)

    def sync_file(self, path: Path) -> None:
        self._add("sync_file", path)

    def sync_dir(self, path: Path) -> None:
        if path.is_relative_to(self.root):
            self._add("sync_dir", path)

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self._add("rename", old, new)

    def remove_file(self, path: Path) -> None:
        super().remove_file(path)
        self._add("remove", path)

    def remove_tree(self, path: Path) -> None:
        super().remove_tree(path)
        self._add("remove", path)


class DiskAfterPowerLoss:
    """What may be on a disk after a prefix of a log: each change of a folder lasts once that folder is synced,
    the content of a file once the file is. `keeps(index)` says whether an unsynced change lasted by luck.
    """

    def __init__(self, log: list[Act], keeps: Callable[[int], bool]) -> None:
        self.files: dict[int, bytes] = {}  # inode -> what is durable of it
        self._written: dict[int, bytes] = {}
        self._log = log
        self._keeps = keeps
        self._num_inodes = 0

    def rebuild(self, root: Path) -> None:
        """Make the tree under `root`, which must not be there."""
        live: dict[str, int] = {".": self._inode()}  # what a process saw
        children: dict[int, dict[str, int]] = {live["."]: {}}  # durable entries by folder
        waiting: list[tuple[int, int, str, int | None]] = []  # (act, folder, name, inode or removed)
        for index, act in enumerate(self._log):
            folder, name = os.path.split(act.path)
            if act.kind in ("make_dir", "write"):
                live[act.path] = inode = self._inode()
                waiting.append((index, live[folder or "."], name, inode))
                if act.kind == "make_dir":
                    children[inode] = {}
                else:
                    self._written[inode] = act.content
                    self.files[inode] = act.content if self._keeps(index) else b""
            elif act.kind == "sync_file":
                self.files[live[act.path]] = self._written[live[act.path]]
            elif act.kind == "sync_dir":
                inode = live[act.path]
                for _, at, entry, target in [change for change in waiting if change[1] == inode]:
                    _set(children[at], entry, target)
                waiting = [change for change in waiting if change[1] != inode]
            elif act.kind == "rename":
                new_folder, new_name = os.path.split(act.other)
                inode = live[act.path]
                waiting.append((index, live[folder or "."], name, None))
                waiting.append((index, live[new_folder or "."], new_name, inode))
                for path in [p for p in live if p == act.path or p.startswith(act.path + "/")]:
                    live[act.other + path[len(act.path) :]] = live.pop(path)
            elif act.kind == "remove" and act.path in live:
                waiting.append((index, live[folder or "."], name, None))
                for path in [p for p in live if p == act.path or p.startswith(act.path + "/")]:
                    del live[path]
        for index, at, entry, target in waiting:
            if self._keeps(index):
                _set(children[at], entry, target)
        self._write_out(root, 0, children)

    def _write_out(self, path: Path, inode: int, children: dict[int, dict[str, int]]) -> None:
        path.mkdir()
        for name, child in children[inode].items():
            if child in children:
                self._write_out(path / name, child, children)
            else:
                (path / name).write_bytes(self.files[child])

    def _inode(self) -> int:
        self._num_inodes += 1
        return self._num_inodes - 1


def _set(entries: dict[str, int], name: str, target: int | None) -> None:
    if target is None:
        entries.pop(name, None)
    else:
        entries[name] = target


def make_catalog(
    root: Path,
    *folders: Path,
    gate: FakeGate | None = None,
    store: AdapterStore | None = None,
    checked_for: str = "demo",
) -> Catalog:
    fs = UnsyncedFileSystem()
    return Catalog(
        store or AdapterStore(root, fs),
        CheckpointFolders(folders, fs, base_name="demo-llama"),
        gate or FakeGate(),
        checked_for=checked_for,
        base_name="demo-llama",
        now=lambda: NOON,
    )


@contextmanager
def opened(root: Path, gate: FakeGate | None = None) -> Iterator[Catalog]:
    """A catalog over a store that is closed at the end."""
    store = AdapterStore(root, UnsyncedFileSystem())
    try:
        yield make_catalog(root, gate=gate, store=store)
    finally:
        store.close()


def write_folder(place: Path, files: CheckpointFiles) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    (place / CONFIG_FILE).write_bytes(files.config)
    (place / WEIGHTS_FILE).write_bytes(files.weights)
    return place


def corrupt(root: Path, adapter: AdapterId) -> None:
    """Flip a bit of a stored checkpoint's weights."""
    path = root / "blobs" / "sha256" / adapter.removeprefix("sha256:") / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def stamp_of(path: Path) -> Stamp:
    found = DiskFileSystem().stamp(path)
    assert found is not None
    return found


def remove(path: Path) -> None:
    shutil.rmtree(path)
