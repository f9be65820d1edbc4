"""Faults apart: when a pass over a step's rows fails, those it fails for are told from the others.

A pass may be run again: what it writes are keys and values in the rows' own blocks, at the same places, and nothing
is told to anybody before it has come to its end. So the rows are run again by adapter, and those of one adapter by
halves, until a row fails alone: it has no result, and everybody else has the one they would have had. Where memory ran
short, the whole pass comes once more first, behind the allocator giving back what nobody uses. Where not even
the base runs on a token of its own, no row is to blame, and the step fails as a whole.

Knows neither logits nor sites: how rows are run is given.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Final

from peft_serve.adapters.frames import without_frames
from peft_serve.adapters.shortage import is_short_of_memory
from peft_serve.core import BASE_SLOT, Draw, Reading, Row, RowResult, SamplingParams
from peft_serve.errors import Internal, Unavailable

RunRows = Callable[[Sequence[Row]], list[RowResult]]
"""A pass over rows sorted by slot: a result for each."""

_RETRY_S: Final = 1.0
_ANY_TOKEN: Final = (0,)
_GREEDY: Final = Draw(params=SamplingParams(), seed=0, index=0)

_log = logging.getLogger(__name__)


class Apart:
    """See the module. `free` gives back what the device's allocator keeps and nobody uses."""

    def __init__(self, run: RunRows, *, free: Callable[[], None] = lambda: None) -> None:
        self._run = run
        self._free = free
        self.was_short_of_memory = False  # in the last call of `run`

    def run(self, rows: Sequence[Row]) -> list[RowResult]:
        """A result for each row, with a `failure` where it is the row's. Raises if the base itself does not run."""
        self.was_short_of_memory = False
        given, error = self._attempt(rows)
        if error is None:
            return given
        if self._make_way(error):
            given, error = self._attempt(rows)  # what the allocator kept may have been all that was missing
            if error is None:
                return given
            self._make_way(error)
        _, at_all = self._attempt([_probe(rows[0])])
        if at_all is not None:
            raise at_all
        return self._apart(rows, error)

    def _apart(self, rows: Sequence[Row], error: Exception) -> list[RowResult]:
        """The results of rows whose pass has failed."""
        if len(rows) == 1:
            _log.error("request %s failed in slot %d: %s", rows[0].request, rows[0].slot, type(error).__name__)
            return [RowResult(request=rows[0].request, branch=rows[0].branch, failure=_failure(error))]
        results: list[RowResult] = []
        for part in _parts(rows):
            given, fault = self._attempt(part)
            if fault is not None:
                self._make_way(fault)
                given = self._apart(part, fault)
            results += given
        return results

    def _attempt(self, rows: Sequence[Row]) -> tuple[list[RowResult], Exception | None]:
        try:
            return self._run(rows), None
        except Exception as error:  # noqa: BLE001  # whatever it is, it is somebody's
            _log.exception("a pass over %d rows failed, and is looked into", len(rows))
            return [], without_frames(error)

    def _make_way(self, error: Exception) -> bool:
        """Give memory back where it ran short; False where it did not."""
        if not is_short_of_memory(error):
            return False
        self.was_short_of_memory = True
        self._free()
        return True


def _parts(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by slot; those of one slot in halves."""
    parts = [list(part) for _, part in groupby(rows, key=lambda row: row.slot)]
    middle = len(rows) // 2
    return parts if len(parts) > 1 else [list(rows[:middle]), list(rows[middle:])]


def _probe(row: Row) -> Row:
    """One token through the base alone, in the blocks of a row that is run again, or given up, behind it."""
    source = _ANY_TOKEN if row.source else ()
    reading = None if row.reading is None else Reading.LAST
    return replace(
        row,
        slot=BASE_SLOT,
        tokens=_ANY_TOKEN,
        draw=_GREEDY if reading is None else None,
        wanted=(),
        num_wanted_top=0,
        source=source,
        num_source=len(source) or row.num_source,
        num_unplaced=0,
        active_from=0,
        prompt=(row.start, row.start + 1),
        reading=reading,
        segments=(),
    )


def _failure(error: Exception) -> Exception:
    if is_short_of_memory(error):
        told = "memory ran out while the request was computed; try again later, or make it shorter"
        return Unavailable(told, retry_after_s=_RETRY_S)
    return Internal(f"the forward pass failed for this request ({type(error).__name__}); it was not completed")
