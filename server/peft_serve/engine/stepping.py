"""Stepping: a planned step is run, and what came of it is brought to the scheduler.

A fault of some rows has been told from the others by then (`RowResult.failure`). What is left is a step that raises,
since the base itself does not run: its rows fail and the engine goes on, for the next step may do; where it goes on
failing, nothing will, and the engine is to die. Memory that ran short is given back by adapters that nobody uses.
Used on the engine's thread alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, Protocol, runtime_checkable

from peft_serve.adapters.shortage import is_short_of_memory
from peft_serve.core import Event, Step, StepResult
from peft_serve.errors import Internal, ServeError, Unavailable
from peft_serve.scheduling.scheduler import Scheduler

MOST_FAILED: Final = 5
"""Steps that may fail one after the other before the engine counts as dead."""

_RETRY_S: Final = 1.0

_log = logging.getLogger(__name__)


class Runner(Protocol):
    """What runs a step: the model floor's `StepRunner`, or a fake."""

    def run(self, step: Step) -> StepResult: ...


@runtime_checkable
class Overlapping(Protocol):
    """A runner whose device may compute while the host does something else."""

    def overlap(self, meanwhile: Callable[[], None]) -> bool:
        """Call this while the device computes a step; False where that cannot be. It does not raise."""
        ...


class EngineError(Exception):
    """Nothing that the engine could do next would come to a good end."""


class Stepping:
    """See the module."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._num_failed = 0  # one after the other, up to now

    def overlap(self, meanwhile: Callable[[], None]) -> bool:
        """See `Overlapping`; False for a runner that knows nothing of it."""
        return isinstance(self._runner, Overlapping) and self._runner.overlap(meanwhile)

    def run(self, step: Step) -> list[Event]:
        """The events of a step that has just been planned."""
        try:
            result = self._runner.run(step)
        except Exception as error:  # noqa: BLE001  # the step's rows fail, nobody else's do, and the engine goes on
            self._num_failed += 1
            _log.exception("step %d failed with %d rows", step.id, len(step.rows))
            is_short = is_short_of_memory(error)
            events = self._scheduler.abandon(step.id, _failure(error, is_short=is_short))
        else:
            self._num_failed = 0
            is_short = result.was_short_of_memory
            events = self._scheduler.commit(result)
        if is_short:
            self._make_room()
        return events

    def require_working(self) -> None:
        """Raise EngineError after too many steps that failed one after the other."""
        if self._num_failed >= MOST_FAILED:
            raise EngineError(f"{self._num_failed} steps failed one after the other")

    def _make_room(self) -> None:
        """The next step empties the slots that nobody uses now."""
        for resident in self._scheduler.snapshot().resident:
            self._scheduler.evict(resident.adapter)


def _failure(error: Exception, *, is_short: bool) -> ServeError:
    if is_short:
        return Unavailable("memory ran out in the forward pass; try again later", retry_after_s=_RETRY_S)
    return Internal(f"the forward pass failed ({type(error).__name__}); the request was not completed")
