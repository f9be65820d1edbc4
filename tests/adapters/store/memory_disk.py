"""A disk in memory that keeps a log of all that changed it, and tells what a power cut after any act may have left.

What lasts follows the rules of fsync and nothing kinder: a file's bytes last once the file is synced, a folder's
entries once the folder is; of the rest every part lasts or not by itself, and unsynced bytes may be cut short. It also
fails on demand at any call, as a disk with a bad sector, without room, or gone altogether does.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from peft_serve.adapters.filesystem import Stamp

Tree = dict[str, "bytes | Tree"]
"""A folder's content by name."""

Fault = Callable[[str, Path, int], OSError | None]
"""Asked before each call: what it is, where, and how many came before. An error makes the call fail."""

READS = frozenset({"read", "read_into", "list_dir", "is_dir", "stamp"})
MOST_OUTCOMES = int(os.environ.get("STORE_OUTCOMES", "64"))
"""Of one power cut; beyond it they are drawn."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a folder now stands for a node, or for nothing."""

    folder: int
    name: str
    node: int | None


@dataclass(frozen=True, slots=True)
class Content:
    node: int
    content: bytes


@dataclass(frozen=True, slots=True)
class Sync:
    node: int


@dataclass(frozen=True, slots=True)
class Told:
    """Somebody was told that an act is done."""

    num_done: int


Line = Entry | Content | Sync | Told


def healthy(_kind: str, _path: Path, _number: int) -> OSError | None:
    return None


class MemoryDisk:
    """A `FileSystem`; see the module. `tree` is what lies there, durably, when it is mounted."""

    def __init__(self, tree: Tree | None = None, *, fault: Fault = healthy, free_bytes: int = 1 << 40) -> None:
        self.fault = fault
        self.free = free_bytes
        self.num_calls = 0
        self.log: list[Line] = []
        self._folders: dict[int, dict[str, int]] = {0: {}}
        self._files: dict[int, bytes] = {}
        self._numbers = itertools.count(1)
        self._locked: set[Path] = set()
        self._mount(0, tree or {})
        self._first = (
            {node: dict(entries) for node, entries in self._folders.items()},
            dict(self._files),
        )

    def _mount(self, folder: int, tree: Tree) -> None:
        for name, content in tree.items():
            node = self._folders[folder][name] = next(self._numbers)
            if isinstance(content, bytes):
                self._files[node] = content
            else:
                self._folders[node] = {}
                self._mount(node, content)

    # what the store calls

    def make_dir(self, path: Path) -> None:
        self._call("make_dir", path)
        for place in (*reversed(path.parents), path):
            if place != place.parent and self._find(place) is None:
                node = next(self._numbers)
                self._folders[node] = {}
                self._enter(place, node)

    def write(self, path: Path, content: bytes) -> None:
        failed = self.fault("write", path, self.num_calls)
        self.num_calls += 1
        if self._find(path) is not None:
            raise FileExistsError(errno.EEXIST, "File exists")
        node = next(self._numbers)
        self._files[node] = content if failed is None else content[: len(content) // 2]
        self._enter(path, node)
        self.log.append(Content(node, self._files[node]))
        if failed is not None:  # a part was taken
            raise failed

    def sync_file(self, path: Path) -> None:
        self._call("sync_file", path)
        node = self._there(path)
        assert node in self._files, "a file is synced"
        self.log.append(Sync(node))

    def sync_dir(self, path: Path) -> None:
        self._call("sync_dir", path)
        node = self._there(path)
        assert node in self._folders, "a folder is synced"
        self.log.append(Sync(node))

    def rename(self, old: Path, new: Path) -> None:
        self._call("rename", old)
        node, there = self._there(old), self._find(new)
        if there is not None and (self._folders.get(there) or (there in self._files) != (node in self._files)):
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        self._enter(old, None)
        self._enter(new, node)

    def link(self, old: Path, new: Path) -> None:
        self._call("link", new)
        node = self._there(old)
        if self._find(new) is not None:
            raise FileExistsError(errno.EEXIST, "File exists")
        self._enter(new, node)

    def remove_file(self, path: Path) -> None:
        self._call("remove_file", path)
        self._there(path)
        self._enter(path, None)

    def remove_tree(self, path: Path) -> None:
        self._call("remove_tree", path)
        if self._find(path) is not None:
            for name in list(self._folders.get(self._there(path), ())):
                inner = self._find(path / name)
                if inner in self._folders:
                    for each in list(self._folders[inner]):
                        self._enter(path / name / each, None)
                self._enter(path / name, None)
            self._enter(path, None)

    def read(self, path: Path) -> bytes:
        self._call("read", path)
        return self._files[self._there(path)]

    def read_into(self, path: Path, buffer: memoryview) -> int:
        content = self.read(path)[: len(buffer)]
        buffer[: len(content)] = content
        return len(content)

    def touch(self, path: Path) -> None:
        self._call("touch", path)
        self._there(path)

    def list_dir(self, path: Path) -> list[str]:
        self._call("list_dir", path)
        return sorted(self._folders[self._there(path)])

    def is_dir(self, path: Path) -> bool:
        self._call("is_dir", path)
        return self._find(path) in self._folders

    def stamp(self, path: Path) -> Stamp | None:
        self._call("stamp", path)
        node = self._find(path)
        return (0, len(self._files[node])) if node in self._files else None

    def free_bytes(self, path: Path) -> int:
        self._call("free_bytes", path)
        return self.free

    def lock(self, path: Path) -> Callable[[], None]:
        self._call("lock", path)
        if path in self._locked:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        self._locked.add(path)
        return lambda: self._locked.discard(path)

    def _call(self, kind: str, path: Path) -> None:
        failed = self.fault(kind, path, self.num_calls)
        self.num_calls += 1
        if failed is not None:
            raise failed

    def _enter(self, path: Path, node: int | None) -> None:
        folder = self._there(path.parent)
        set_entry(self._folders[folder], path.name, node)
        self.log.append(Entry(folder, path.name, node))

    def _find(self, path: Path) -> int | None:
        node: int | None = 0
        for name in path.parts[1:]:
            node = self._folders.get(node, {}).get(name) if node is not None else None
        return node

    def _there(self, path: Path) -> int:
        node = self._find(path)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return node

    # what tests look at

    def tree(self) -> Tree:
        """All that a process sees."""
        return _tree(0, self._folders, self._files)

    def told(self, num_done: int) -> None:
        self.log.append(Told(num_done))

    def after_power_cut(self, num_lines: int, *, scratch: str = "tmp") -> Iterator[Tree]:
        """Each tree that may be there when the power fails after so many lines of the log; no tree twice.

        What happens inside the folder `scratch` lasts as a whole or not at all: nobody may read it.
        """
        folders, files, waiting, torn = self._durable(num_lines)
        groups: dict[object, list[Entry]] = {}
        scratches = {line.node for line in self.log if isinstance(line, Entry) and line.name == scratch}
        for number, entry in enumerate(waiting):
            groups.setdefault("scratch" if entry.folder in scratches else number, []).append(entry)
        seen = set()
        choices = [(False, True)] * len(groups) + [(0, 1, 2)] * len(torn)
        for luck in _outcomes(choices, seed=num_lines):
            kept = {node: dict(entries) for node, entries in folders.items()}
            for lasts, entries in zip(luck, groups.values(), strict=False):
                for entry in entries if lasts else ():
                    set_entry(kept.setdefault(entry.folder, {}), entry.name, entry.node)
            bytes_ = dict(files)
            for much, (node, content) in zip(luck[len(groups) :], torn.items(), strict=True):
                bytes_[node] = (bytes_.get(node, b""), content[: len(content) // 2], content)[much]
            found = _tree(0, kept, bytes_, known=self._folders.keys())
            if repr(found) not in seen:
                seen.add(repr(found))
                yield found

    def _durable(
        self, num_lines: int
    ) -> tuple[dict[int, dict[str, int]], dict[int, bytes], list[Entry], dict[int, bytes]]:
        """Folders and files as far as they are sure to last, the entries that are not, and the bytes that are not."""
        folders = {node: dict(entries) for node, entries in self._first[0].items()}
        files, torn = dict(self._first[1]), dict[int, bytes]()
        waiting: list[Entry] = []
        for line in self.log[:num_lines]:
            if isinstance(line, Entry):
                waiting.append(line)
            elif isinstance(line, Content):
                torn[line.node] = line.content
            elif isinstance(line, Sync):
                for entry in [each for each in waiting if each.folder == line.node]:
                    set_entry(folders.setdefault(entry.folder, {}), entry.name, entry.node)
                waiting = [entry for entry in waiting if entry.folder != line.node]
                if line.node in torn:
                    files[line.node] = torn.pop(line.node)
        return folders, files, waiting, torn


def _outcomes(choices: list[tuple[int, ...]], *, seed: int) -> Iterator[tuple[int, ...]]:
    num_outcomes = 1
    for options in choices:
        num_outcomes *= len(options)
    if num_outcomes <= MOST_OUTCOMES:
        yield from itertools.product(*choices)
        return
    yield tuple(options[0] for options in choices)
    yield tuple(options[-1] for options in choices)
    rng = random.Random(seed)
    for _ in range(MOST_OUTCOMES - 2):
        yield tuple(rng.choice(options) for options in choices)


def _tree(node: int, folders: dict[int, dict[str, int]], files: dict[int, bytes], known: object = frozenset()) -> Tree:
    found: Tree = {}
    for name, child in sorted(folders.get(node, {}).items()):
        is_folder = child in folders or (child not in files and child in known)  # type: ignore[operator]
        found[name] = _tree(child, folders, files, known) if is_folder else files.get(child, b"")
    return found


def set_entry(entries: dict[str, int], name: str, node: int | None) -> None:
    if node is None:
        entries.pop(name, None)
    else:
        entries[name] = node
