"""The cache trace: every lookup of an adapter as a line of JSON, to be replayed against other policies and sizes.

Owns a bounded queue and the thread that writes it out, so that who asks never waits for a disk. Lines that do not
fit are left out and counted; after `max_lines`, or an error, nothing more is written. Requests' texts are never
part of it, only adapters' ids.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from peft_serve.adapters.lookups import Lookup

_log = logging.getLogger(__name__)

_MAX_BATCH = 1024  # lines written at a time


class CacheTrace:
    """See the module. `append` puts text at the end of the file; `now` gives seconds of the calendar's clock."""

    def __init__(
        self,
        append: Callable[[str], None],
        *,
        now: Callable[[], float],
        max_waiting: int = 65_536,
        max_lines: int = 10_000_000,
    ) -> None:
        self._append = append
        self._now = now
        self._num_left = max_lines
        self._num_lost = 0
        self._waiting: queue.Queue[tuple[float, Lookup] | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._main, name="cache-trace", daemon=True)

    @property
    def num_lost(self) -> int:
        """Lines left out because the writer could not keep up."""
        return self._num_lost

    def start(self) -> None:
        self._thread.start()

    def note(self, lookup: Lookup) -> None:
        """Write the lookup down, soon. Never waits."""
        try:
            self._waiting.put_nowait((self._now(), lookup))
        except queue.Full:
            self._num_lost += 1

    def stop(self) -> None:
        """Write out what waits and end the thread. Blocks."""
        self._waiting.put(None)
        self._thread.join()
        if self._num_lost:
            _log.warning("the cache trace lacks %d lines: its file could not keep up", self._num_lost)

    def _main(self) -> None:
        is_open = True
        while is_open:
            batch = list(self._batch())
            is_open = len(batch) > 0 and batch[-1] is not None
            lines = [_line(*entry) for entry in batch if entry is not None][: self._num_left]
            if lines:
                self._write(lines)

    def _batch(self) -> Iterator[tuple[float, Lookup] | None]:
        """What waits, at least one entry; None, the sign to stop, comes last."""
        entry = self._waiting.get()
        yield entry
        for _ in range(_MAX_BATCH):
            if entry is None or self._waiting.empty():
                return
            entry = self._waiting.get()
            yield entry

    def _write(self, lines: list[str]) -> None:
        self._num_left -= len(lines)
        try:
            self._append("".join(lines))
        except OSError:
            # Serving goes on without it; a full disk is not filled further.
            _log.exception("the cache trace ends: its file cannot be written")
            self._num_left = 0
        else:
            if self._num_left == 0:
                _log.warning("the cache trace is full; nothing more is written to it")


def _line(now_s: float, lookup: Lookup) -> str:
    fields = {
        "time": round(now_s, 6),
        "tier": lookup.tier,
        "adapter": lookup.adapter,
        "hit": lookup.is_hit,
        "bytes": lookup.num_bytes,
        "load_s": lookup.load_s,
    }
    return json.dumps(fields) + "\n"


def appender(path: Path) -> Callable[[str], None]:
    """Puts text at the end of the file, which is opened for each time anew: it may be moved away meanwhile.

    Raises `ValueError` if it cannot be written to now.
    """

    def append(text: str) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)

    try:
        append("")
    except OSError as error:
        raise ValueError(f"--cache-trace {path}: cannot be written ({error.strerror}); name another file") from error
    return append
