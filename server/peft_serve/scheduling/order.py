"""The order of the queue: who among those that wait is looked at first.

`ArrivalOrder` is first come, first served. `FairOrder` gives every adapter the same share of the server's tokens as
long as it has someone waiting: the adapter that was given the fewest comes first (the virtual token counter of
"Fairness in Serving Large Language Models", arXiv 2401.00588). One adapter's flood then delays itself only.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Final, Protocol

from peft_serve.core import AdapterId, RequestState
from peft_serve.scheduling.queue import WaitingQueue
from peft_serve.scheduling.tracked import Tracked

PROMPT_WEIGHT: Final = 1.0
OUTPUT_WEIGHT: Final = 2.0
"""What a token costs its adapter. A drawn one takes a row of a step for itself; the paper's figures."""

_MAX_IDLE: Final = 4096  # counters kept of adapters that nobody waits for


class Order(Protocol):
    """Told of everything that is given; asked for the line before each step."""

    @property
    def is_by_arrival(self) -> bool:
        """Whether age alone decides, so that the oldest request may be let in before everybody else."""
        ...

    def line(self, queue: WaitingQueue) -> Iterator[Tracked]:
        """Those that wait, first to be served first. A request may be started while the line is read."""
        ...

    def note_arrival(self, tracked: Tracked, queue: WaitingQueue) -> None:
        """A request is about to join the queue."""
        ...

    def note_start(self, tracked: Tracked) -> None:
        """A request runs for the first time; its prompt will be computed, as far as it is not found."""
        ...

    def note_token(self, tracked: Tracked) -> None:
        """A request has been given a token."""
        ...


class ArrivalOrder:
    """Oldest first."""

    is_by_arrival = True

    def line(self, queue: WaitingQueue) -> Iterator[Tracked]:
        return iter(tuple(queue))

    def note_arrival(self, tracked: Tracked, queue: WaitingQueue) -> None:
        pass

    def note_start(self, tracked: Tracked) -> None:
        pass

    def note_token(self, tracked: Tracked) -> None:
        pass


class FairOrder:
    """The adapter that was given the fewest weighted tokens first; each adapter's requests oldest first."""

    is_by_arrival = False

    def __init__(self) -> None:
        self._given: dict[AdapterId, float] = {}
        self._floor = 0.0  # of the adapter that was served last: who comes to an empty queue begins there

    def line(self, queue: WaitingQueue) -> Iterator[Tracked]:
        waiting = {adapter: iter(queue.waiters(adapter)) for adapter in queue.adapters}
        heads: list[tuple[float, int, AdapterId, Tracked]] = []
        for adapter, own in waiting.items():
            first = next(own)
            heads.append((self._given.get(adapter, self._floor), first.seq, adapter, first))
        heapq.heapify(heads)
        while heads:
            _, _, adapter, tracked = heapq.heappop(heads)
            yield tracked
            following = next(waiting[adapter], None)
            if following is not None:
                heapq.heappush(heads, (self._given.get(adapter, self._floor), following.seq, adapter, following))

    def note_arrival(self, tracked: Tracked, queue: WaitingQueue) -> None:
        """Who comes back after a while has saved nothing up: it begins with the least of those that wait."""
        if queue.has_waiters(tracked.adapter):
            return
        waiting = [self._given.get(adapter, self._floor) for adapter in queue.adapters]
        least = min(waiting, default=self._floor)
        self._given[tracked.adapter] = max(self._given.get(tracked.adapter, 0.0), least)
        if len(self._given) > _MAX_IDLE + len(waiting):
            self._forget(queue, least)

    def note_start(self, tracked: Tracked) -> None:
        assert tracked.state is RequestState.RUNNING, f"request {tracked.id} does not run"
        self._floor = self._given.get(tracked.adapter, self._floor)
        num_tokens = len(tracked.request.prompt) - tracked.num_cached
        self._give(tracked, PROMPT_WEIGHT * num_tokens)

    def note_token(self, tracked: Tracked) -> None:
        self._give(tracked, OUTPUT_WEIGHT)

    def given(self, adapter: AdapterId) -> float:
        """Weighted tokens on the adapter's counter."""
        return self._given.get(adapter, 0.0)

    def _give(self, tracked: Tracked, cost: float) -> None:
        self._given[tracked.adapter] = self._given.get(tracked.adapter, self._floor) + cost

    def _forget(self, queue: WaitingQueue, least: float) -> None:
        """Drop the counters that their adapters would be lifted above anyway."""
        self._given = {a: given for a, given in self._given.items() if given > least or queue.has_waiters(a)}
