"""Folders that are watched: a checkpoint that is put into one becomes a version of the name its folder has.

Looks from time to time, since no other way works on every file system. A folder is read when nothing in it changed for
the settle time, or at once when it was moved in whole; what changes later is a new version. Owns what it has seen; what
a name stands for is its shelf's business.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from peft_serve.adapters.members import WANTED, UploadLimits
from peft_serve.adapters.records import CONFIG_FILE, CheckpointFiles
from peft_serve.adapters.sources.folder import Progress, fetch
from peft_serve.adapters.sources.local import LocalFolder
from peft_serve.core import AdapterId
from peft_serve.errors import ServeError

RETRY_S: Final = 30.0
"""How long what failed for no fault of the checkpoint waits before it is read again."""

_PASSED_OVER: Final = (".tmp", ".part", ".partial")

_log = logging.getLogger(__name__)


class Shelf(Protocol):
    """Where watched checkpoints go. Methods block and raise ServeErrors."""

    def ids(self, name: str) -> frozenset[AdapterId]:
        """Every version of a name; none for one that is unknown."""
        ...

    def came_from(self, prefix: str) -> Iterable[str]:
        """The names whose current version has a source that begins so."""
        ...

    def publish_watched(self, name: str, files: CheckpointFiles, source: str) -> None: ...

    def remove_watched(self, name: str, source: str) -> bool:
        """Delete a name if its current version has this source; gives whether it did."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A folder's files as they are now."""

    marks: tuple[tuple[str, int, int, int], ...]  # of each file that is read: name, bytes, time of change (ns), inode
    newest_s: float  # the last time that something in it changed, by the files' and the folder's own times
    is_moved_in: bool  # the folder was renamed, or finished by whoever copied it, after all that is in it


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchProblem:
    """A folder, without the path to it, and why it is not served."""

    source: str
    problem: str


@dataclass(slots=True)
class _Seen:
    """What is known of one place."""

    look: Look | None = None
    since_s: float = 0.0  # when it was first seen as it is
    is_handled: bool = False
    is_known: bool = False  # something was made of it since the start
    retry_s: float = 0.0


def look_at(place: Path) -> Look | None:
    """The folder at `place`; None if it is none, or holds no adapter config."""
    try:
        folder = place.stat()
        found = {name: (place / name).stat() for name in WANTED if (place / name).is_file()}
    except OSError:
        return None
    if CONFIG_FILE not in found:
        return None
    newest_ns = max(folder.st_mtime_ns, *(each.st_mtime_ns for each in found.values()))
    return Look(
        marks=tuple((name, each.st_size, each.st_mtime_ns, each.st_ino) for name, each in sorted(found.items())),
        newest_s=newest_ns / 1e9,
        # Making an entry sets both times of a folder; a rename, or restoring its times, the second alone.
        is_moved_in=folder.st_ctime_ns > folder.st_mtime_ns
        and all(each.st_ctime_ns <= folder.st_ctime_ns for each in found.values()),
    )


class FolderWatch:
    """One thread over all watched folders. `now` gives unix seconds, on the clock of the files' times."""

    def __init__(
        self,
        roots: Sequence[Path],
        shelf: Shelf,
        *,
        limits: UploadLimits,
        now: Callable[[], float],
        settle_s: float,
        interval_s: float,
        removes: bool = False,
        look: Callable[[Path], Look | None] = look_at,
    ) -> None:
        """With `removes` a name goes when its folder does."""
        self._roots = tuple(root.absolute() for root in roots)
        self._shelf = shelf
        self._limits = limits
        self._now = now
        self._settle_s = settle_s
        self._interval_s = interval_s
        self._removes = removes
        self._look = look
        self._seen: dict[Path, _Seen] = {}
        self._problems: dict[Path, str] = {}
        self._has_begun = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._main, name="folder-watch", daemon=True)

    @property
    def problems(self) -> tuple[WatchProblem, ...]:
        """What is there and not served."""
        found = sorted(self._problems.copy().items())
        return tuple(WatchProblem(source=self._source(place), problem=problem) for place, problem in found)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Nothing more is read; what is being read is given up. Returns at once."""
        self._stopped.set()

    def poll(self) -> None:
        """One look at every folder."""
        if not self._has_begun and self._removes:
            self._remember()
        self._has_begun = True
        found: set[Path] = set()
        listed: set[Path] = set()
        for root in self._roots:
            places = self._places(root)
            if places is None:
                continue
            listed.add(root)
            for place in places:
                look = self._look(place)
                if look is not None:
                    found.add(place)
                    self._attend(place, look)
        for place in [place for place in self._seen if place not in found and place.parent in listed]:
            self._miss(place)

    def _main(self) -> None:
        while not self._stopped.is_set():
            try:
                self.poll()
            except Exception:  # noqa: BLE001  # the next look may find it put right
                _log.exception("looking through the watched folders failed")
            self._stopped.wait(self._interval_s)

    def _remember(self) -> None:
        """Names that were made of folders before the server started, so that it shows which of these are gone."""
        for root in self._roots:
            for name in self._shelf.came_from(f"{self._source(root)}/"):
                self._seen[root / name] = _Seen(since_s=self._now(), is_known=True)

    def _places(self, root: Path) -> list[Path] | None:
        try:
            places = sorted(root.iterdir())
        except OSError as error:
            self._complain(root, f"cannot be listed ({error.strerror}); nothing in it is read until it can")
            return None
        self._problems.pop(root, None)
        return [place for place in places if not place.name.startswith(".") and place.suffix not in _PASSED_OVER]

    def _attend(self, place: Path, look: Look) -> None:
        now = self._now()
        seen = self._seen.setdefault(place, _Seen())
        if seen.look is None or seen.look.marks != look.marks:
            seen.since_s, seen.is_handled, seen.retry_s = now, False, 0.0
        seen.look = look
        if seen.is_handled or now < seen.retry_s:
            return
        still_s = now - min(seen.since_s, look.newest_s)  # by what was seen, or by what the files say
        if look.is_moved_in or still_s >= self._settle_s:
            self._take_in(place, seen, now)

    def _take_in(self, place: Path, seen: _Seen, now: float) -> None:
        source = self._source(place)
        try:
            folder = LocalFolder(place.parent, place, kind="watch")
            files = fetch(folder, self._limits, Progress(self._check_running))
            if seen.is_known or files.digest() not in self._shelf.ids(place.name):
                self._shelf.publish_watched(place.name, files, source)
        except ServeError as error:
            if error.status >= 500:
                seen.retry_s = now + RETRY_S
            else:
                seen.is_handled = seen.is_known = True
            self._complain(place, error.message)
            return
        seen.is_handled = seen.is_known = True
        self._problems.pop(place, None)

    def _miss(self, place: Path) -> None:
        """A folder is gone: its name is kept, or goes after the settle time, in which it may be replaced."""
        now, seen = self._now(), self._seen[place]
        if seen.look is not None:
            seen.look, seen.since_s = None, now
            seen.is_handled = False
        self._problems.pop(place, None)
        if now - seen.since_s < self._settle_s:
            return
        del self._seen[place]
        if not self._removes or any((root / place.name).is_dir() for root in self._roots):
            return
        try:
            if self._shelf.remove_watched(place.name, self._source(place)):
                _log.info("%s is gone; adapter %s is deleted", self._source(place), place.name)
        except ServeError as error:
            _log.warning("%s is gone; adapter %s is not deleted: %s", self._source(place), place.name, error.message)

    def _check_running(self) -> None:
        if self._stopped.is_set():
            raise ServeError("the server is stopping")

    def _complain(self, place: Path, problem: str) -> None:
        if self._problems.get(place) != problem:
            _log.warning("%s is not served: %s", self._source(place), problem)
        self._problems[place] = problem

    def _source(self, place: Path) -> str:
        inside = (place.name,) if place in self._roots else (place.parent.name, place.name)
        return "watch:" + "/".join(inside)
