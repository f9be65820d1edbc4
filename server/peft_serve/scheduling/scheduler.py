"""The scheduler: requests and adapters in, steps out, results in, events out.

    submit, cancel, adapter_ready, ... -> plan() -> [the model runs the step] -> commit() or abandon()

One thread owns it. One step is under way at a time: every `plan` that gives a step is answered by one `commit`
or `abandon`; cancels and evictions in between are fine. It knows no model, no files and no clock but the one it
is given. The parts: `WaitingQueue` and `Roster` (who), `SlotLedger`, `BlockLedger`, `Residency`, `Memory` (what
they hold), `Planner` (who next), `Outcome` (what came of it).
"""

from __future__ import annotations

from collections.abc import Callable

from peft_serve.core import (
    BASE,
    AdapterId,
    Event,
    FinishEvent,
    FinishReason,
    Footprint,
    Request,
    RequestId,
    RequestState,
    Step,
    StepResult,
)
from peft_serve.scheduling.blocks import BlockLedger
from peft_serve.scheduling.draft import Flight
from peft_serve.scheduling.forecast import Forecast
from peft_serve.scheduling.limits import Limits
from peft_serve.scheduling.memory import Memory
from peft_serve.scheduling.order import ArrivalOrder, Order
from peft_serve.scheduling.outcome import Outcome
from peft_serve.scheduling.planner import Planner
from peft_serve.scheduling.prefix_cache import PrefixCache
from peft_serve.scheduling.residency import Residency
from peft_serve.scheduling.roster import Roster
from peft_serve.scheduling.slots import SlotLedger
from peft_serve.scheduling.snapshot import Snapshot
from peft_serve.scheduling.step_time import StepTimeModel


class Scheduler:
    """Continuous batching over many adapters, as plain bookkeeping."""

    def __init__(
        self,
        limits: Limits,
        slots: SlotLedger,
        blocks: BlockLedger,
        cross_blocks: BlockLedger | None,
        clock: Callable[[], float],
        order: Order | None = None,
    ) -> None:
        """`order` is that of the queue; oldest first unless given."""
        if limits.is_encoder_decoder != (cross_blocks is not None):
            raise ValueError("an encoder-decoder base needs cross_blocks, a decoder-only base must have none")
        self._limits = limits
        self._slots = slots
        self._blocks = blocks
        self._cross_blocks = cross_blocks
        self._residency = Residency(limits, slots, blocks)
        is_cached = limits.prefix_caching and not (limits.is_encoder or limits.is_encoder_decoder)
        cache = PrefixCache(blocks, block_size=limits.block_size, is_on=is_cached)
        self._memory = Memory(limits, slots, blocks, cross_blocks, self._residency, cache)
        self._step_time = StepTimeModel()
        order = order or ArrivalOrder()
        forecast = Forecast(limits, self._step_time)
        self._roster = Roster(limits, self._memory, self._residency, order, forecast, clock)
        self._planner = Planner(limits, self._roster, self._memory, self._residency, order, self._step_time, clock)
        self._outcome = Outcome(limits, self._roster, self._memory, self._residency, clock)
        self._flight: Flight | None = None
        self._landed: Flight | None = None
        self._failures: list[FinishEvent] = []  # of `plan`, until somebody takes events

    # -- requests

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `QueueFull`; `ValueError` for an id in use or a request without a token."""
        self._roster.add(request)

    def cancel(self, request: RequestId, reason: FinishReason = FinishReason.CANCELLED) -> list[Event]:
        """End a request now, whatever it is doing; nothing for one that has ended already."""
        tracked = self._roster.find(request)
        events = self.take_events()
        if tracked is not None:
            events.append(self._roster.finish(tracked, reason))
        return events

    # -- adapters

    def take_loads(self) -> tuple[AdapterId, ...]:
        """Adapters that the host must load now, in queue order; each is named once a load.

        Answer each with `adapter_ready` or `adapter_failed`. At most `max_loads` are on their way at a time;
        the head of the queue does not count.
        """
        adapters = self._roster.queue.adapters
        self._residency.forget_unwanted(adapters)
        cold = {adapter for adapter in adapters if self._residency.is_cold(adapter)}
        loads: list[AdapterId] = []
        for tracked in self._roster.queue if cold else ():
            has_room = self._residency.num_on_the_way < self._limits.max_loads
            if not cold or (not has_room and tracked is not self._roster.queue.head):
                break
            if tracked.adapter in cold:
                cold.remove(tracked.adapter)
                self._residency.ask(tracked.adapter)
                loads.append(tracked.adapter)
        for adapter in loads:
            for waiter in self._roster.queue.waiters(adapter):
                waiter.move(RequestState.LOADING)
        return tuple(loads)

    def adapter_ready(self, adapter: AdapterId, footprint: Footprint) -> None:
        """The host has the adapter, and keeps it while it is in `claims`."""
        self._settle(adapter)
        if self._roster.queue.has_waiters(adapter):
            self._residency.make_ready(adapter, footprint)

    def adapter_failed(self, adapter: AdapterId, error: Exception) -> list[Event]:
        """The adapter's load failed: so do the requests that wait for it, and no others."""
        events = self.take_events()
        self._settle(adapter)
        if not self._residency.is_seated(adapter):
            for tracked in self._roster.queue.waiters(adapter):
                events.append(self._roster.finish(tracked, FinishReason.FAILED, error))
        return events

    @property
    def claims(self) -> frozenset[AdapterId]:
        """Adapters whose host copy must stay: asked for, ready, planned into a slot, or there and reading it."""
        self._residency.forget_unwanted(self._roster.queue.adapters)
        reading = self._slots.resident() if self._limits.reads_host_copies else ()
        return self._residency.claims.union(resident.adapter for resident in reading)

    def evict(self, adapter: AdapterId) -> bool:
        """Empty the adapter's slot with the next step; False while it is in use or pinned, or has none."""
        return self._residency.evict(adapter)

    def pin(self, adapter: AdapterId) -> None:
        """Never evict the adapter, from now on and whenever it has a slot."""
        self._slots.pin(adapter)

    def unpin(self, adapter: AdapterId) -> None:
        self._slots.unpin(adapter)

    # -- steps

    def plan(self) -> Step | None:
        """The next step; None when nobody can run now.

        A request that can never run fails here; its event comes with the next `take_events`, or with the
        events of the next `commit`, `abandon`, `cancel` or `adapter_failed`.
        """
        assert self._flight is None, "a step is under way: commit or abandon it first"
        self._flight = self._planner.plan(self._failures)
        return None if self._flight is None else self._flight.step

    def commit(self, result: StepResult) -> list[Event]:
        """Take the results of the planned step."""
        flight = self._landed = self._land(result.step_id)
        return [*self.take_events(), *self._outcome.commit(flight, result)]

    def abandon(self, step_id: int, error: Exception) -> list[Event]:
        """The planned step raised: its rows' requests fail, and the slots it was to change are emptied."""
        flight = self._land(step_id)
        return [*self.take_events(), *self._outcome.abandon(flight, error)]

    def note_time(self, seconds: float) -> None:
        """What the last committed step took, all told. One that moved adapters says nothing about the next."""
        flight, self._landed = self._landed, None
        if flight is not None and not flight.step.installs and not flight.step.removes:
            self._step_time.observe(flight.load, seconds)

    def take_events(self) -> list[Event]:
        """Failures that `plan` found."""
        events: list[Event] = list(self._failures)
        self._failures.clear()
        return events

    # -- how things stand

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended, or its last event was not taken."""
        return len(self._roster) > 0 or bool(self._failures)

    def open_requests(self) -> tuple[RequestId, ...]:
        """Every request that has not ended, in order of arrival."""
        return self._roster.open_ids()

    def snapshot(self) -> Snapshot:
        queue, cross = self._roster.queue, self._cross_blocks
        return Snapshot(
            num_waiting=len(queue),
            num_loading=sum(tracked.state is RequestState.LOADING for tracked in queue),
            num_running=len(self._roster.running),
            waiting_adapters=queue.adapters,
            num_waiters=queue.num_waiters,
            running_adapters=tuple({tracked.adapter: None for tracked in self._roster.running.values()}),
            resident=self._slots.resident(),
            pinned=self._slots.pinned,
            device_bytes=self._slots.num_bytes,
            num_slots=self._slots.num_slots,
            num_blocks=self._blocks.capacity,
            num_free_blocks=self._blocks.num_free,
            kv_usage=self._residency.usage,
            wait_s=self._roster.wait_s,
            step_time=self._step_time.coefficients,
            cross_kv_usage=0.0 if cross is None else cross.usage,
        )

    def check(self) -> None:
        """Assert that all books are consistent with each other."""
        running = self._roster.running.values()
        self._slots.check()
        self._residency.check()
        self._roster.check()
        self._memory.check(iter(running))
        assert self._slots.num_leases == len(running), "leases and running requests differ"

    def _land(self, step_id: int) -> Flight:
        flight = self._flight
        assert flight is not None, f"step {step_id} is not under way"
        assert flight.step.id == step_id, f"step {flight.step.id} is under way, not {step_id}"
        self._flight = None
        return flight

    def _settle(self, adapter: AdapterId) -> None:
        """The load is over: whoever was LOADING waits for a slot, or for the verdict."""
        assert adapter != BASE, "the base is not loaded"
        if self._residency.is_asked(adapter):
            for tracked in self._roster.queue.waiters(adapter):
                self._roster.note_loaded(tracked)
        self._residency.forget(adapter)
