"""A bucket in a folder that several processes share, on one machine or over NFS. No lock is taken.

    <key>          the first content under a key
    <key>~2, ~3    what it was replaced by; the highest number is what lies there
    tmp/           what is being written

Content is written beside, synced, and linked to the next number. A link is made by one process alone, so of several
who replace the same number one does. Earlier numbers go when they have been replaced for longer than `grace_s`: by
then nobody is in the middle of a change that began before. A change that took half of that is refused by who makes it.
A process that dies between a folder and its first file leaves the folder: it is empty, and removing it could take it
from under somebody who is about to link a file there.
"""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from peft_serve.adapters.filesystem import FileSystem
from peft_serve.adapters.shared.bucket import Found, Oversize

_FILE: Final = re.compile(r"(?P<name>[^~]*\.[^~]*)(?:~(?P<number>[1-9][0-9]*))?")
_MAX_LOOKS: Final = 10
_TMP: Final = "tmp"


class FolderBucket:
    """Owner of nothing but its own scratch files: everybody may write. `clock` gives monotonic seconds, `new_name`
    names that no process gives again."""

    def __init__(
        self,
        root: Path,
        fs: FileSystem,
        *,
        clock: Callable[[], float],
        new_name: Callable[[], str],
        grace_s: float,
        min_free_bytes: int = 0,
    ) -> None:
        """`min_free_bytes` of the disk are left to others."""
        self._root = root
        self._fs = fs
        self._clock = clock
        self._new_name = new_name
        self._grace_s = grace_s
        self._min_free_bytes = min_free_bytes
        self._lock = threading.Lock()
        self._numbers: dict[str, int] = {}  # of each key the highest that was seen
        self._leftovers: dict[Path, float] = {}  # what nobody needs, and since when that is known
        fs.make_dir(root / _TMP)
        fs.sync_dir(root)
        for folder in root.parents:  # they may be as new
            with suppress(OSError):  # and may be nobody's to open: then they were here before
                fs.sync_dir(folder)

    def get(self, key: str, *, max_bytes: int) -> Found | None:
        for _ in range(_MAX_LOOKS):
            number = self._newest(key)
            if number == 0:
                return None
            path = self._path(key, number)
            try:
                stamp = self._fs.stamp(path)
                if stamp is not None and stamp[1] > max_bytes:
                    raise Oversize(key)
                return Found(content=self._fs.read(path), tag=str(number))
            except FileNotFoundError:  # replaced, and tidied away, since it was looked for
                continue
        raise OSError(errno.EIO, "what lies there changes all the time")

    def put(self, key: str, content: bytes) -> None:
        with self._lock:
            known = self._numbers.get(key, 0)
        newest = self._newest(key)
        number = max(known, newest) + 1
        if not self._linked(key, number, content, began_s=self._clock()):
            raise OSError(errno.EEXIST, "another process writes under a key of this one's own")
        for each in range(max(1, newest), number):
            with suppress(FileNotFoundError):
                self._fs.remove_file(self._path(key, each))

    def put_new(self, key: str, content: bytes) -> str | None:
        began_s = self._clock()
        if self._newest(key) or not self._linked(key, 1, content, began_s=began_s):
            return None
        return "1"

    def replace(self, key: str, content: bytes, tag: str) -> str | None:
        began_s, number = self._clock(), int(tag)
        if self._newest(key) != number or not self._linked(key, number + 1, content, began_s=began_s):
            return None
        return str(number + 1)

    def tags(self, prefix: str) -> dict[str, str]:
        found: dict[str, int] = {}
        for key, number in self._below(prefix):
            found[key] = max(number, found.get(key, 0))
        with self._lock:
            for key, number in found.items():
                self._numbers[key] = max(number, self._numbers.get(key, 0))
        return {key: str(number) for key, number in found.items()}

    def remove(self, key: str) -> None:
        if key.endswith("/"):
            self._fs.remove_tree(self._root / key)
            return
        folder = key.rpartition("/")[0]
        for each, number in sorted(self._files(f"{folder}/"), key=lambda file: file[1]):
            if each == key:
                with suppress(FileNotFoundError):
                    self._fs.remove_file(self._path(key, number))

    def require_room(self, num_bytes: int) -> None:
        if self._fs.free_bytes(self._root) < num_bytes + self._min_free_bytes:
            raise OSError(errno.ENOSPC, "what must stay free would be used")

    def tidy(self) -> None:
        now_s = self._clock()
        unneeded = {self._root / _TMP / name for name in self._fs.list_dir(self._root / _TMP)}
        newest: dict[str, int] = {}
        for key, number in sorted(self._below(""), key=lambda file: file[1]):
            if key in newest:
                unneeded.add(self._path(key, newest[key]))
            newest[key] = number
        self._leftovers = {path: self._leftovers.get(path, now_s) for path in unneeded}
        for path, since_s in sorted(self._leftovers.items(), key=lambda item: _number_of(item[0])):  # oldest first
            if now_s - since_s >= self._grace_s:
                with suppress(OSError):
                    self._fs.remove_file(path)

    # files

    def _linked(self, key: str, number: int, content: bytes, *, began_s: float) -> bool:
        """Make `number` of a key; False where it is made already."""
        scratch, path = self._root / _TMP / self._new_name(), self._path(key, number)
        try:
            self._fs.write(scratch, content)
            self._fs.sync_file(scratch)
            if number == 1:
                self._fs.make_dir(path.parent)
            self._require_soon(began_s)
            self._fs.link(scratch, path)
        except FileExistsError:
            return False
        finally:
            with suppress(OSError):
                self._fs.remove_file(scratch)
        for folder in self._parents(path) if number == 1 else [path.parent]:
            self._fs.sync_dir(folder)
        self._require_soon(began_s)
        with self._lock:
            self._numbers[key] = max(number, self._numbers.get(key, 0))
        return True

    def _require_soon(self, began_s: float) -> None:
        if self._clock() - began_s > self._grace_s / 2:
            raise OSError(errno.ETIMEDOUT, "the change took so long that others may have tidied up meanwhile")

    def _newest(self, key: str) -> int:
        """The highest number of a key; 0 where there is none."""
        with self._lock:
            number = self._numbers.get(key, 1)
        if self._is_there(key, number):
            while self._is_there(key, number + 1):
                number += 1
        else:
            folder = f"{key.rpartition('/')[0]}/"
            number = max((each for found, each in self._files(folder) if found == key), default=0)
        if number:
            with self._lock:
                self._numbers[key] = max(number, self._numbers.get(key, 0))
        return number

    def _is_there(self, key: str, number: int) -> bool:
        return self._fs.stamp(self._path(key, number)) is not None

    def _below(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Every file of a key below a prefix, with its number."""
        yield from self._files(prefix)
        for name in self._entries(prefix):
            if "." not in name and (prefix, name) != ("", _TMP):
                yield from self._below(f"{prefix}{name}/")

    def _files(self, prefix: str) -> Iterator[tuple[str, int]]:
        prefix = "" if prefix == "/" else prefix
        for name in self._entries(prefix):
            file = _FILE.fullmatch(name)
            if file is not None:
                yield f"{prefix}{file['name']}", int(file["number"] or 1)

    def _entries(self, prefix: str) -> list[str]:
        try:
            return self._fs.list_dir(self._root / prefix)
        except (FileNotFoundError, NotADirectoryError):
            if not self._fs.is_dir(self._root / _TMP):  # nothing is there: it went, or is not mounted
                raise OSError(errno.EIO, "the folder of the store is away") from None
            return []

    def _path(self, key: str, number: int) -> Path:
        return self._root / (key if number == 1 else f"{key}~{number}")

    def _parents(self, path: Path) -> Iterator[Path]:
        for folder in path.parents:
            yield folder
            if folder == self._root:
                return


def _number_of(path: Path) -> int:
    file = _FILE.fullmatch(path.name)
    return int(file["number"] or 1) if file is not None else 0
