"""What the process asks the operating system to open, list or change, by Python's audit events."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

EVENTS = frozenset(
    {
        *("open", "os.chdir", "os.chmod", "os.chown", "os.link", "os.listdir", "os.mkdir", "os.remove", "os.rename"),
        *("os.rmdir", "os.scandir", "os.symlink", "os.truncate", "os.utime", "os.system", "os.exec", "os.posix_spawn"),
        *("subprocess.Popen", "socket.getaddrinfo", "ctypes.dlopen", "import"),
    }
)


class Watch:
    """One hook for the life of the process: Python takes none back. It listens inside of `watching` only."""

    def __init__(self) -> None:
        self._heard: list[tuple[str, str]] | None = None
        self._lock = threading.Lock()
        sys.addaudithook(self._hear)

    @contextmanager
    def watching(self) -> Iterator[list[tuple[str, str]]]:
        """The events so far, each with the paths it is about; of any thread."""
        heard: list[tuple[str, str]] = []
        with self._lock:
            assert self._heard is None, "one at a time"
            self._heard = heard
        try:
            yield heard
        finally:
            with self._lock:
                self._heard = None

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        heard = self._heard
        if heard is None or event not in EVENTS:
            return
        for argument in arguments[:2]:
            if isinstance(argument, str | bytes | os.PathLike):
                heard.append((event, os.fsdecode(argument)))


@cache
def watch() -> Watch:
    return Watch()


def outside(heard: list[tuple[str, str]], *allowed: Path) -> list[tuple[str, str]]:
    """The events about a path that lies in none of the folders; modes of files, which are text too, are left out."""
    roots = tuple(str(folder.resolve()) for folder in allowed)
    return [(event, path) for event, path in heard if not _is_mode(path) and not _lies_in(path, roots)]


def _is_mode(text: str) -> bool:
    return 0 < len(text) <= 3 and set(text) <= set("rwaxbt+")


def _lies_in(path: str, roots: tuple[str, ...]) -> bool:
    try:
        real = os.path.realpath(path)
    except ValueError:  # a NUL in it
        return False
    return any(real == root or real.startswith(root + os.sep) for root in roots)
