"""A folder that one process writes to and others may read: its lock, its scratch space, and how a file is replaced.

Where this process may not write, a folder that was laid out before is read as it lies, without the lock. What the
files mean is not known here.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from peft_serve.adapters.filesystem import FileSystem
from peft_serve.adapters.sealed import seal
from peft_serve.adapters.store_words import NO_WRITING, told
from peft_serve.errors import Forbidden, NotFound, ServeError, Unavailable, UnknownAdapter

_LOG: Final = logging.getLogger(__name__)
BEFORE_THE_STORE: Final = frozenset({Forbidden.code, UnknownAdapter.code, NotFound.code})  # who may, what there is


class StoreFolder:
    """Owner of the folder `root`. `folders` are those that are kept, `tmp` is emptied when it is opened.

    Raises Unavailable where another process has the lock, and what `told` makes of the disk's refusals.
    """

    def __init__(self, root: Path, fs: FileSystem, folders: Sequence[Path], *, writes: bool = True) -> None:
        """Without `writes` whatever would change the folder is refused, as where this process may not."""
        self.root = root
        self._fs = fs
        self._folders = tuple(folders)
        self._tmp = root / "tmp"
        self._tmp_ids = itertools.count()
        with told("opened"):
            if not writes:
                self._make_folders()
            self._unlock = self._opened() if writes else None

    @property
    def is_read_only(self) -> bool:
        """Whether this process may only read: then it holds no lock, and whatever would write is refused."""
        return self._unlock is None

    def close(self) -> None:
        """Let another process own the folder."""
        if self._unlock is not None:
            self._unlock()

    def _opened(self) -> Callable[[], None] | None:
        """The release of the lock; None where a store is that this process may not write to."""
        try:
            self._fs.make_dir(self.root)
            unlock = self._lock(self.root / "lock")
            try:
                self._lay_out()
            except BaseException:
                unlock()
                raise
        except OSError as error:
            if error.errno not in NO_WRITING or not all(map(self._fs.is_dir, self._folders)):
                raise
            _LOG.warning(
                "the adapter store %s is read-only (%s): its adapters are served, and none can be uploaded, changed or "
                "deleted",
                self.root,
                error.strerror,
            )
            return None
        return unlock

    def _make_folders(self) -> None:
        """A reader may come before who writes, and finds nothing then."""
        for path in self._folders:
            self._fs.make_dir(path)

    def _lock(self, path: Path) -> Callable[[], None]:
        try:
            return self._fs.lock(path)
        except BlockingIOError:
            raise Unavailable(
                f"the adapter store {path.parent} is in use by another server process; stop that one, "
                "or give this one a store of its own with --store"
            ) from None

    def _lay_out(self) -> None:
        """Make the folders, durably, and sweep what a crash left half written."""
        self._fs.remove_tree(self._tmp)
        for path in (*self._folders, self._tmp):
            self._fs.make_dir(path)
        for path in dict.fromkeys([*(folder.parent for folder in self._folders), self.root, self.root.parent]):
            self._fs.sync_dir(path)
        for path in self.root.parent.parents:  # they may be as new, from this start or from one that was cut short
            with suppress(OSError):  # and may be nobody's to open: then they were here before
                self._fs.sync_dir(path)

    # writing

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Whatever changes the folder is done in here; raises StoreFull and Unavailable."""
        self.require_writable()
        with told("written"):
            yield

    def require_writable(self) -> None:
        """Raise Unavailable where this process may only read."""
        if self.is_read_only:
            with told("written"):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    @contextmanager
    def told_first(self) -> Iterator[None]:
        """What refuses a change in here gives way to what the disk refuses: whoever did as a 409 or a 412 says would
        only hear of the disk next. A disk may have turned read-only since the start, so it is asked then."""
        try:
            yield
        except ServeError as error:
            if error.status < 500 and error.code not in BEFORE_THE_STORE:
                self._try()
            raise

    def _try(self) -> None:
        with self.writing(), self.scratch() as file:
            self._fs.write(file, b"")

    def replace(self, path: Path, body: Mapping[str, Any]) -> None:
        """Put a sealed document in the place of an earlier one: whole, and durable on return."""
        with self.writing(), self.scratch() as file:
            self._fs.write(file, seal(body))
            self._fs.sync_file(file)
            self._fs.rename(file, path)
            self._fs.sync_dir(path.parent)

    def fresh(self) -> Path:
        """A path in `tmp` where nothing is."""
        return self._tmp / str(next(self._tmp_ids))

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A fresh path; whatever is there at the end is removed."""
        path = self.fresh()
        try:
            yield path
        finally:
            self.clear(path)

    def clear(self, path: Path) -> None:
        """Remove what is at a fresh path; the sweep at the next start gets what resists now."""
        with suppress(OSError):
            if self._fs.is_dir(path):
                self._fs.remove_tree(path)
            elif self._fs.stamp(path) is not None:
                self._fs.remove_file(path)
