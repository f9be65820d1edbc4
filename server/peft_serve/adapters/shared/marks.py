"""Marks of change: how processes tell each other which documents they have replaced.

    marks/<writer>.json   the last changes of one process, numbered; only it writes there

A look lists the marks, which are as many as there are processes, and reads those whose tag is new: while nothing
changes it is one listing. A mark is put behind the change it tells of, so what it names can be read when it is seen. A
process that dies between the two tells nobody: that change was not acknowledged, and is found when the names are next
listed.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Final

from peft_serve.adapters.sealed import SealError, seal, unseal
from peft_serve.adapters.shared.bucket import Bucket, Oversize

FOLDER: Final = "marks/"
_KEPT: Final = 64  # changes in a mark
_MAX_BYTES: Final = 1 << 20


class Marks:
    """Owner of this process's mark. `writer` is a name that no other process has. Methods raise OSError."""

    def __init__(self, bucket: Bucket, writer: str) -> None:
        self._bucket = bucket
        self._key = f"{FOLDER}{writer}.json"
        self._lock = threading.Lock()  # orders the writes of the mark
        self._num_changes = 0
        self._changes: list[tuple[int, str]] = []  # the last ones, by number
        self._is_owed = False  # one of them has not been told
        self._seen: dict[str, tuple[str, int]] = {}  # of each other mark: its tag, and the number of its last change

    def add(self, key: str) -> None:
        """Tell that the document under `key` was replaced. Where that fails, the next `settle` tells it."""
        with self._lock:
            self._num_changes += 1
            self._changes = [*self._changes, (self._num_changes, key)][-_KEPT:]
            self._is_owed = True
            self._write()

    def begin(self) -> None:
        """Put a mark without changes, which shows whether this process may write."""
        with self._lock:
            self._write()

    def settle(self) -> None:
        """Tell what could not be told."""
        with self._lock:
            if self._is_owed:
                self._write()

    def _write(self) -> None:
        self._bucket.put(self._key, seal({"changes": self._changes}))
        self._is_owed = False

    def news(self) -> frozenset[str] | None:
        """The keys that others have replaced since this was last asked; None if that cannot be told."""
        tags = {key: tag for key, tag in self._bucket.tags(FOLDER).items() if key != self._key}
        seen: dict[str, tuple[str, int]] = {}
        news: set[str] | None = set()
        for key, tag in tags.items():
            before = self._seen.get(key)
            if before is not None and before[0] == tag:
                seen[key] = before
                continue
            changes = self._read(key)
            last = before[1] if before is not None else 0
            if changes is None or (changes and changes[0][0] > last + 1):
                news = None  # some of its changes are told no more
            elif news is not None:
                news |= {each for number, each in changes if number > last}
            seen[key] = (tag, changes[-1][0] if changes else last)
        self._seen = seen  # all of it, or what was seen before: then it is told the next time
        return None if news is None else frozenset(news)

    def _read(self, key: str) -> list[tuple[int, str]] | None:
        """The changes in a mark; None where it is damaged, or gone."""
        try:
            found = self._bucket.get(key, max_bytes=_MAX_BYTES)
            body: Mapping[str, Any] = {} if found is None else unseal(found.content)
            return [(int(number), str(each)) for number, each in body["changes"]]
        except (SealError, Oversize, KeyError, TypeError, ValueError):
            return None
