"""The engine's books: how things stood at the end of the last step, put together from the parts that know.

Written by the engine's thread; the snapshot that stands is replaced whole, so that any thread may read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from peft_serve.adapters.host_cache import HostCache
from peft_serve.core import AdapterId, Step
from peft_serve.engine.snapshot import EngineSnapshot, EngineState
from peft_serve.engine.tally import StepTally
from peft_serve.scheduling.scheduler import Scheduler


class EngineBooks:
    """The last snapshot and what it is made of. `note`, `begin`, `end` and `refresh` are the engine thread's."""

    def __init__(
        self, scheduler: Scheduler, host_cache: HostCache, *, block_size: int, clock: Callable[[], float]
    ) -> None:
        self._scheduler = scheduler
        self._host_cache = host_cache
        self._block_size = block_size
        self._clock = clock
        self._tally = StepTally()
        self._num_steps = 0
        self._began_s: float | None = None  # of the step that runs
        self._last = EngineSnapshot(state=EngineState.STARTING)
        self._at_hand: frozenset[AdapterId] = frozenset()

    @property
    def num_waiting(self) -> int:
        """Requests that waited at the end of the last step."""
        return self._last.num_waiting

    @property
    def wait_s(self) -> float:
        """Seconds that a request was expected to wait for its first token, at the end of the last step."""
        return self._last.wait_s

    def has_on_device(self, adapter: AdapterId) -> bool:
        """Whether the adapter was on the device at the end of the last step."""
        return adapter in self._at_hand

    def snapshot(self, state: EngineState) -> EngineSnapshot:
        """The last one, with how long the step in progress has been running."""
        began_s = self._began_s
        stalled_s = 0.0 if began_s is None else self._clock() - began_s
        return replace(self._last, state=state, stalled_s=stalled_s)

    def begin(self, began_s: float) -> None:
        """A step is under way, planned since then."""
        self._began_s = began_s

    def end(self, step: Step) -> None:
        """The step has run."""
        self._began_s = None
        self._num_steps += 1
        self._tally.note(step)

    def refresh(self, state: EngineState) -> None:
        """Put a new snapshot together."""
        books, host = self._scheduler.snapshot(), self._host_cache.stats()
        if books.resident is not self._last.resident:  # the ledger gives the same ones until something changes
            self._at_hand = frozenset(resident.adapter for resident in books.resident)
        self._last = EngineSnapshot(
            state=state,
            num_running=books.num_running,
            num_waiting=books.num_waiting,
            num_loading=books.num_loading,
            running_adapters=books.running_adapters,
            waiting_adapters=books.waiting_adapters,
            num_waiters=books.num_waiters,
            resident=books.resident,
            pinned=books.pinned,
            host_adapters=self._host_cache.resident(),
            device_bytes=books.device_bytes,
            host_bytes=host.num_bytes,
            num_slots=books.num_slots,
            kv_usage=books.kv_usage,
            wait_s=books.wait_s,
            step_time=books.step_time,
            num_blocks=books.num_blocks,
            block_size=self._block_size,
            num_steps=self._num_steps,
            last_rows=self._tally.rows,
            num_prompt_tokens=self._tally.num_prompt_tokens,
            num_drawn_tokens=self._tally.num_drawn_tokens,
        )
