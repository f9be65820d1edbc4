"""The roster: every request that has not ended, and the only place where one changes hands.

    add -> queue -> start -> running -> finish
                  ^--------- preempt

Whatever the way out, `finish` gives everything back: the slot lease, the blocks, the place in the queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from peft_serve.core import (
    AdapterId,
    FinishEvent,
    FinishReason,
    Footprint,
    Request,
    RequestId,
    RequestState,
)
from peft_serve.scheduling.forecast import Forecast, too_late
from peft_serve.scheduling.limits import Limits
from peft_serve.scheduling.memory import Memory
from peft_serve.scheduling.order import Order
from peft_serve.scheduling.queue import WaitingQueue
from peft_serve.scheduling.residency import Residency
from peft_serve.scheduling.tracked import Tracked, track


class Roster:
    """Requests by id, the queue, and who runs (oldest first)."""

    def __init__(
        self,
        limits: Limits,
        memory: Memory,
        residency: Residency,
        order: Order,
        forecast: Forecast,
        clock: Callable[[], float],
    ) -> None:
        self._limits = limits
        self._order = order
        self._forecast = forecast
        self._memory = memory
        self._residency = residency
        self._clock = clock
        self._requests: dict[RequestId, Tracked] = {}
        self._num_seen = 0
        self.queue = WaitingQueue(max_queue=limits.max_queue)
        self.running: dict[RequestId, Tracked] = {}
        self._num_rows = 0

    def __len__(self) -> int:
        return len(self._requests)

    def find(self, request: RequestId) -> Tracked | None:
        return self._requests.get(request)

    def open_ids(self) -> tuple[RequestId, ...]:
        return tuple(self._requests)

    def has_rows_for(self, tracked: Tracked) -> bool:
        """Whether the request may run beside those that do: each beam counts as a row."""
        return self._num_rows + tracked.num_rows <= self._limits.max_rows

    @property
    def wait_s(self) -> float:
        """Seconds until a request that comes now would have its first token, as far as the others are to blame."""
        return self._forecast.first_token_s(1, self.queue, num_running=self._num_rows, now_s=self._clock())

    @property
    def by_arrival(self) -> list[Tracked]:
        """The running requests, oldest first."""
        return sorted(self.running.values(), key=lambda tracked: tracked.seq)

    def running_on(self, adapter: AdapterId) -> list[Tracked]:
        return [tracked for tracked in self.by_arrival if tracked.adapter == adapter]

    def add(self, request: Request) -> None:
        """Queue a new request.

        Raises `QueueFull`; `DeadlineMissed` for one that would wait longer than it is to; `ValueError` for one that
        cannot be told apart or run.
        """
        if request.id in self._requests:
            raise ValueError(f"request id {request.id} is in use: ids must be unique")
        now_s = self._clock()
        self.queue.require_room(now_s)
        tracked = track(request, self._limits, seq=self._num_seen)
        self._forecast.require_in_time(tracked, self.queue, num_running=self._num_rows, now_s=now_s)
        self._num_seen += 1
        self._order.note_arrival(tracked, self.queue)
        if self._residency.is_asked(tracked.adapter):
            tracked.move(RequestState.LOADING)
        self._requests[request.id] = tracked
        self.queue.push(tracked)

    def start(self, tracked: Tracked, footprint: Footprint) -> None:
        """Let a waiting request run on its seated adapter; `Memory.has_room` has said yes."""
        tracked.move(RequestState.RUNNING)
        self.queue.remove(tracked)
        self._memory.open(tracked, footprint)
        self.running[tracked.id] = tracked
        self._num_rows += tracked.num_rows
        if tracked.first_step_s is None:
            self._order.note_start(tracked)

    def note_loaded(self, tracked: Tracked) -> None:
        """The load that a request waited for is over."""
        tracked.move(RequestState.WAITING)
        tracked.loaded_s = self._clock()

    def note_token(self, tracked: Tracked) -> None:
        """A running request has been given a token."""
        self._order.note_token(tracked)

    def end_late(self, now_s: float) -> Iterator[FinishEvent]:
        """End the requests that were to run by now and have not been begun."""
        for tracked in self._forecast.expired(now_s):
            yield self.finish(tracked, FinishReason.FAILED, too_late(tracked))

    def preempt(self, tracked: Tracked) -> None:
        """Send a running request back to its place in the queue; its tokens stay and are computed again."""
        tracked.move(RequestState.WAITING)
        self._stop(tracked)
        self.queue.push(tracked)

    def finish(self, tracked: Tracked, reason: FinishReason, error: Exception | None = None) -> FinishEvent:
        """End a request, on every way out, and give back everything it holds."""
        if tracked.state is RequestState.RUNNING:
            self._stop(tracked)
        else:
            self.queue.remove(tracked)
        tracked.move(RequestState.FINISHED)
        del self._requests[tracked.id]
        now_s = self._clock()
        self.queue.note_finish(now_s)
        started_s = now_s if tracked.first_step_s is None else tracked.first_step_s
        return FinishEvent(
            request=tracked.id,
            reason=reason,
            error=error,
            queue_s=max(0.0, started_s - tracked.request.arrival_s),
            load_s=0.0 if tracked.loaded_s is None else max(0.0, tracked.loaded_s - tracked.request.arrival_s),
            num_prompt_tokens=len(tracked.request.prompt),
            num_output_tokens=tracked.num_outputs,
            num_cached_tokens=tracked.num_cached,
        )

    def check(self) -> None:
        """Assert that every request is in exactly one place, and holds what its place allows."""
        self.queue.check()
        waiting = {tracked.id for tracked in self.queue}
        assert not waiting & self.running.keys(), "a request runs and waits"
        assert waiting | self.running.keys() == self._requests.keys(), "a request is nowhere"
        for tracked in self.queue:
            is_asked = self._residency.is_asked(tracked.adapter)
            assert tracked.state is (RequestState.LOADING if is_asked else RequestState.WAITING), "wrong state"
            assert tracked.lease is None, "a waiting request has a lease"
            assert not tracked.table, "a waiting request has blocks"
        num_rows = sum(tracked.num_rows for tracked in self.running.values())
        assert num_rows == self._num_rows <= self._limits.max_rows, "more rows run than may, or they are miscounted"
        for tracked in self.running.values():
            assert tracked.state is RequestState.RUNNING, "a running request is in the wrong state"
            assert tracked.lease is not None, "a running request has no lease"

    def _stop(self, tracked: Tracked) -> None:
        del self.running[tracked.id]
        self._num_rows -= tracked.num_rows
        self._memory.give_back(tracked)
