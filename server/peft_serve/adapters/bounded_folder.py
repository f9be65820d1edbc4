"""A folder of files that can all be made again, within a budget of bytes; those that were used last are kept.

    <2 hex>/<mark>.<key>     a file: its name, which ends in a key of hex digits, also says which sub-folder it is in
    tmp/                     what is being written

Files appear whole, by rename, and are never changed, so that several processes can use one folder. The time of a
file's last change says when it was last used; beyond the budget the oldest go. Nothing is looked through before the
first write. Used by one writing thread, and by any number that read. What is in the files is not known here.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from peft_serve.adapters.filesystem import FileSystem
from peft_serve.adapters.own_memory import own_memory

_FULL: Final = 0.9  # of the budget is left when files had to go, so that not every write looks through the folder
_LEFTOVER_S: Final = 3600.0  # what is that old and in tmp was left by a crash


class BoundedFolder:
    """Owner of one folder; see the module. Methods raise OSError where the disk does.

    `new_name` gives names that no process gives again, `now_s` seconds since 1970.
    """

    def __init__(
        self,
        root: Path,
        fs: FileSystem,
        *,
        max_bytes: int,
        new_name: Callable[[], str],
        now_s: Callable[[], float],
        min_free_bytes: int = 0,
    ) -> None:
        """`min_free_bytes` of the disk are left to others."""
        self._root = root
        self._tmp = root / "tmp"
        self._fs = fs
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self._new_name = new_name
        self._now_s = now_s
        self._num_bytes: int | None = None  # in the folder, as far as this process knows; None: it has not looked

    def __contains__(self, name: str) -> bool:
        return self._fs.stamp(self._place(name)) is not None

    def read(self, name: str) -> Tensor | None:
        """The bytes of a file (uint8, a tensor of its own memory), which is then the one used last.

        None if there is no such file, or one that is not whole: larger than the folder may be, or changing.
        """
        path = self._place(name)
        stamp = self._fs.stamp(path)
        if stamp is None or stamp[1] > self._max_bytes:
            return None
        content = own_memory(stamp[1], torch.uint8)
        try:
            num_read = self._fs.read_into(path, content.numpy().data)
        except FileNotFoundError:  # another process made room
            return None
        self.touch(name)
        return content if num_read == stamp[1] else None

    def touch(self, name: str) -> None:
        """Make a file the one used last; a disk that takes no writes leaves it as old as it is."""
        with suppress(OSError):
            self._fs.touch(self._place(name))

    def write(self, name: str, content: bytes) -> None:
        """Make a file appear whole, in place of an earlier one. Nothing of it is left when this raises."""
        path = self._place(name)
        if self._num_bytes is None:
            self._sweep()
        for folder in (path.parent, self._tmp):
            self._fs.make_dir(folder)
        if self._fs.free_bytes(self._tmp) < len(content) + self._min_free_bytes:
            raise OSError(errno.ENOSPC, "the rest of the disk is not for files that can be made again")
        scratch = self._tmp / self._new_name()
        try:
            self._fs.write(scratch, content)
            self._fs.sync_file(scratch)
            self._fs.rename(scratch, path)  # not synced: an entry that a power cut takes back was never promised
        except OSError:
            with suppress(OSError):
                self._fs.remove_file(scratch)
            raise
        if self._num_bytes is not None:
            self._num_bytes += len(content)

    def make_room(self) -> int:
        """Delete what was not used for longest until the folder is within its budget; gives how many files went.

        As other processes write too, the folder is looked through whenever the budget seems to be used up.
        """
        if self._num_bytes is not None and self._num_bytes <= self._max_bytes:
            return 0
        files = sorted(self._stamped())
        self._num_bytes = sum(size for _, size, _ in files)
        if self._num_bytes <= self._max_bytes:
            return 0
        num_removed = 0
        for _, size, name in files:
            if self._num_bytes <= _FULL * self._max_bytes:
                break
            self.remove(name)
            self._num_bytes -= size
            num_removed += 1
        return num_removed

    def remove(self, name: str) -> None:
        """Delete a file; one that is gone is fine."""
        with suppress(FileNotFoundError):
            self._fs.remove_file(self._place(name))

    def names(self) -> Iterator[str]:
        """Every file, by listing alone."""
        if self._fs.is_dir(self._root):
            for shard in self._fs.list_dir(self._root):
                if len(shard) == 2:
                    yield from self._fs.list_dir(self._root / shard)

    def _stamped(self) -> Iterator[tuple[int, int, str]]:
        """When each file was last used, its size and its name."""
        for name in self.names():
            stamp = self._fs.stamp(self._place(name))
            if stamp is not None:
                yield *stamp, name

    def _sweep(self) -> None:
        for name in self._fs.list_dir(self._tmp) if self._fs.is_dir(self._tmp) else ():
            stamp = self._fs.stamp(self._tmp / name)
            if stamp is not None and self._now_s() - stamp[0] / 1e9 > _LEFTOVER_S:
                with suppress(FileNotFoundError):
                    self._fs.remove_file(self._tmp / name)

    def _place(self, name: str) -> Path:
        return self._root / name.rpartition(".")[2][:2] / name
