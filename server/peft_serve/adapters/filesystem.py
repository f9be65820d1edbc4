"""The few acts on a disk that the store's promises rest on, one method each.

`FileSystem` is what the store is given, so that tests can put one in that fails or loses power after any act.
`DiskFileSystem` is the real one. Neither knows what an adapter is.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

Stamp = tuple[int, int]
"""When a file was last changed (ns) and its size (bytes)."""


class FileSystem(Protocol):
    """All methods raise OSError. Nothing but `sync_file` and `sync_dir` makes anything durable."""

    def make_dir(self, path: Path) -> None:
        """Make a folder and its parents; one that is there is fine."""
        ...

    def write(self, path: Path, content: bytes) -> None:
        """Make a new file that holds `content`; one that is there is FileExistsError."""
        ...

    def sync_file(self, path: Path) -> None:
        """Make a file's content durable."""
        ...

    def sync_dir(self, path: Path) -> None:
        """Make the entries of a folder durable."""
        ...

    def rename(self, old: Path, new: Path) -> None:
        """Move a file over another, or a folder to where none (or an empty one) is; atomic."""
        ...

    def link(self, old: Path, new: Path) -> None:
        """Give a file a second name where there is none; atomic. One that is there is FileExistsError."""
        ...

    def remove_file(self, path: Path) -> None: ...

    def remove_tree(self, path: Path) -> None:
        """Remove a folder with all in it; one that is not there is fine."""
        ...

    def read(self, path: Path) -> bytes: ...

    def read_into(self, path: Path, buffer: memoryview) -> int:
        """Fill the buffer from the beginning of a file; gives how many bytes there were for it."""
        ...

    def touch(self, path: Path) -> None:
        """Make now the time of a file's last change."""
        ...

    def list_dir(self, path: Path) -> list[str]:
        """The names in a folder, sorted."""
        ...

    def is_dir(self, path: Path) -> bool: ...

    def stamp(self, path: Path) -> Stamp | None:
        """The stamp of a regular file (links are followed); None if there is none."""
        ...

    def free_bytes(self, path: Path) -> int:
        """Room on the disk of a folder, as far as this process may use it."""
        ...

    def lock(self, path: Path) -> Callable[[], None]:
        """Take an exclusive lock that ends with the process; gives its release. Held: BlockingIOError."""
        ...


class DiskFileSystem:
    """The operating system's files."""

    def make_dir(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, content: bytes) -> None:
        with path.open("xb") as file:
            file.write(content)

    def sync_file(self, path: Path) -> None:
        _sync(path, os.O_RDONLY)

    def sync_dir(self, path: Path) -> None:
        _sync(path, os.O_RDONLY | os.O_DIRECTORY)

    def rename(self, old: Path, new: Path) -> None:
        old.replace(new)

    def link(self, old: Path, new: Path) -> None:
        new.hardlink_to(old)

    def remove_file(self, path: Path) -> None:
        path.unlink()

    def remove_tree(self, path: Path) -> None:
        if path.exists():
            shutil.rmtree(path)

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def read_into(self, path: Path, buffer: memoryview) -> int:
        with path.open("rb") as file:
            return file.readinto(buffer)

    def touch(self, path: Path) -> None:
        os.utime(path)

    def list_dir(self, path: Path) -> list[str]:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries)

    def is_dir(self, path: Path) -> bool:
        return path.is_dir()

    def stamp(self, path: Path) -> Stamp | None:
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return (found.st_mtime_ns, found.st_size) if path.is_file() else None

    def free_bytes(self, path: Path) -> int:
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize

    def lock(self, path: Path) -> Callable[[], None]:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
        return lambda: os.close(descriptor)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
