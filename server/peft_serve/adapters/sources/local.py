"""Folders of this machine beneath one that the operator allows. A link is followed only as long as it stays there.

Every file is opened step by step from the allowed folder down without following anything, so that a link that is put
in between looking and opening leads nowhere.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from peft_serve.adapters.members import WANTED
from peft_serve.adapters.sources.folder import Mark
from peft_serve.errors import FetchFailed, Forbidden, NotFound, PayloadTooLarge

_CHUNK_BYTES: Final = 1 << 20
_MAX_NAMES: Final = 1000
_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe is no file, and is not waited for


class LocalFolder:
    """`folder` beneath `root`. `kind` is the word its provenance begins with; that names no place above the root."""

    def __init__(self, root: Path, folder: Path, *, kind: str = "file") -> None:
        self._root = root
        self._folder = folder
        self._kind = kind

    @property
    def provenance(self) -> str:
        inside = self._folder.relative_to(self._root).parts
        return f"{self._kind}:" + "/".join((self._root.name, *inside))

    def listing(self) -> Mapping[str, Mark]:
        with self._opened(self._folder) as descriptor:
            if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise NotFound(
                    f"source {self.provenance}: is no folder; name the one that holds the checkpoint's files"
                )
            names = sorted(os.listdir(descriptor))
        marks = {name: Mark(0, "") for name in names[:_MAX_NAMES] if name not in WANTED}
        for name in set(names).intersection(WANTED):
            with self._opened(self._folder / name) as descriptor:
                found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode):
                marks[name] = Mark(found.st_size, f"{found.st_mtime_ns}-{found.st_ino}")
        return marks

    def read(self, name: str, max_bytes: int, on_bytes: Callable[[int], None]) -> bytes:
        content = bytearray()
        with self._opened(self._folder / name) as descriptor, open(descriptor, "rb", closefd=False) as file:
            while chunk := file.read(_CHUNK_BYTES):
                content += chunk
                if len(content) > max_bytes:
                    raise PayloadTooLarge(f"{name} has more than {max_bytes} bytes, which is what this server accepts")
                on_bytes(len(chunk))
        return bytes(content)

    @contextmanager
    def _opened(self, place: Path) -> Iterator[int]:
        try:
            descriptor = self._open(place)
        except FileNotFoundError:
            raise NotFound(f"source {self.provenance}: there is no such folder, or a file of it went away") from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise self._leads_out() from error
            raise FetchFailed(f"source {self.provenance}: cannot be read; may the server read its files?") from error
        try:
            yield descriptor
        except OSError as error:
            raise FetchFailed(f"source {self.provenance}: cannot be read; may the server read its files?") from error
        finally:
            os.close(descriptor)

    def _open(self, place: Path) -> int:
        root = self._root.resolve(strict=True)
        real = place.resolve(strict=True)
        if not real.is_relative_to(root):
            raise self._leads_out()
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for step in real.relative_to(root).parts:
            try:
                inner = os.open(step, _FLAGS, dir_fd=descriptor)
            finally:
                os.close(descriptor)
            descriptor = inner
        return descriptor

    def _leads_out(self) -> Forbidden:
        return Forbidden(
            f"source {self.provenance}: a link leads out of the folder that is allowed; put the files there"
        )
