"""The order of the queue: who among those that wait is looked at first.

`ArrivalOrder` is first come, first served. `FairOrder` gives every tenant its share of the server's tokens as long as
it has someone waiting, and within a tenant every adapter the same: who was given the fewest comes first (the virtual
token counter of "Fairness in Serving Large Language Models", arXiv 2401.00588, with its weights for tenants). One
tenant's flood then delays itself only, and in it one adapter's flood that adapter. Rows are shares too: a flood that
was there first, and has them all, gives back what is more than its own.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Final, Protocol

from peft_serve.core import AdapterId, RequestState
from peft_serve.scheduling.queue import WaitingQueue
from peft_serve.scheduling.tracked import Tracked

PROMPT_WEIGHT: Final = 1.0
OUTPUT_WEIGHT: Final = 2.0
"""What a token costs whoever it is given to. A drawn one takes a row of a step for itself; the paper's figures."""

_MAX_IDLE: Final = 4096  # counters kept of those that nobody waits for


class Order(Protocol):
    """Told of everything that is given; asked for the line before each step."""

    @property
    def is_by_arrival(self) -> bool:
        """Whether age alone decides, so that the oldest request may be let in before everybody else."""
        ...

    def line(self, queue: WaitingQueue) -> Iterator[Tracked]:
        """Those that wait, first to be served first. A request may be started while the line is read."""
        ...

    def gives_way(
        self, first: Tracked, queue: WaitingQueue, running: Collection[Tracked], max_rows: int
    ) -> Tracked | None:
        """Whom to send back to the queue so that the first of the line may run, all rows being taken; None: nobody."""
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


def order_of(policy: str, *, has_tenants: bool) -> Order:
    """The order of a `scheduling_policy`. Where there are tenants they are served side by side under every policy."""
    if policy == "fair" or has_tenants:
        return FairOrder(between_adapters=policy == "fair")
    return ArrivalOrder()


class ArrivalOrder:
    """Oldest first."""

    is_by_arrival = True

    def line(self, queue: WaitingQueue) -> Iterator[Tracked]:
        return iter(tuple(queue))

    def gives_way(self, *_: object) -> None:
        return None

    def note_arrival(self, tracked: Tracked, queue: WaitingQueue) -> None:
        pass

    def note_start(self, tracked: Tracked) -> None:
        pass

    def note_token(self, tracked: Tracked) -> None:
        pass


class FairOrder:
    """The tenant that was given the fewest weighted tokens first, and of its adapters the one that was given the
    fewest; requests for one adapter oldest first. Not `between_adapters`: a tenant's requests oldest first.

    Without tenants all requests are those of one.
    """

    is_by_arrival = False

    def __init__(self, *, between_adapters: bool = True) -> None:
        self._between_adapters = between_adapters
        self._tenants: Counters = Counters()
        self._adapters: dict[str, Counters] = {}  # of each tenant that has a counter

    def line(self, queue: WaitingQueue) -> Iterator[Tracked]:
        return _merged({tenant: self._own_line(tenant, queue) for tenant in queue.tenants}, self._tenants)

    def _own_line(self, tenant: str, queue: WaitingQueue) -> Iterator[Tracked]:
        waiting = queue.of_tenant(tenant)
        if self._between_adapters:
            lines: dict[str, Iterator[Tracked]] = {adapter: iter(own) for adapter, own in waiting.items()}
            return _merged(lines, self._of(tenant))
        return iter(sorted((each for own in waiting.values() for each in own), key=lambda tracked: tracked.seq))

    def gives_way(
        self, first: Tracked, queue: WaitingQueue, running: Collection[Tracked], max_rows: int
    ) -> Tracked | None:
        """The youngest request of whoever holds more than its share of the rows, while `first` holds less of its own.

        Shares of tenants are as their weights, those of a tenant's adapters equal; everybody's is one row at least.
        """
        tenant = first.request.tenant
        weights = {t.request.tenant: t.request.tenant_weight for t in (*queue, *running)}
        own = [t for t in running if t.request.tenant == tenant]
        rows = Counter[str]()
        for tracked in running:
            rows[tracked.request.tenant] += tracked.num_rows
        over = _over_share(rows, weights, tenant, max_rows)
        if over is not None:
            return max((t for t in running if t.request.tenant == over), key=lambda t: t.seq)
        if not self._between_adapters:
            return None
        by_adapter = Counter[str]()
        for tracked in own:
            by_adapter[tracked.adapter] += tracked.num_rows
        equal = dict.fromkeys((*queue.adapters_of(tenant), *by_adapter), 1.0)
        over = _over_share(by_adapter, equal, first.adapter, by_adapter.total())
        return None if over is None else max((t for t in own if t.adapter == over), key=lambda t: t.seq)

    def note_arrival(self, tracked: Tracked, queue: WaitingQueue) -> None:
        """Who comes back after a while has saved nothing up: it begins with the least of those that wait."""
        tenant, adapter = tracked.request.tenant, tracked.adapter
        if not queue.has_tenant(tenant):
            self._tenants.lift(tenant, queue.tenants)
            if len(self._adapters) > len(self._tenants):
                self._adapters = {each: own for each, own in self._adapters.items() if each in self._tenants}
        adapters = queue.adapters_of(tenant)
        if self._between_adapters and adapter not in adapters:
            self._of(tenant).lift(adapter, adapters)

    def note_start(self, tracked: Tracked) -> None:
        assert tracked.state is RequestState.RUNNING, f"request {tracked.id} does not run"
        tenant = tracked.request.tenant
        self._tenants.serve(tenant)
        if self._between_adapters:
            self._of(tenant).serve(tracked.adapter)
        self._give(tracked, PROMPT_WEIGHT * (len(tracked.request.prompt) - tracked.num_cached))

    def note_token(self, tracked: Tracked) -> None:
        self._give(tracked, OUTPUT_WEIGHT)

    def given(self, adapter: AdapterId, tenant: str = "") -> float:
        """Weighted tokens on the counter of a tenant's adapter."""
        return self._of(tenant).given(adapter)

    def given_to(self, tenant: str) -> float:
        """Weighted tokens on the tenant's counter, divided by its weight."""
        return self._tenants.given(tenant)

    @property
    def num_counters(self) -> int:
        return len(self._tenants) + sum(map(len, self._adapters.values()))

    def _of(self, tenant: str) -> Counters:
        return self._adapters.setdefault(tenant, Counters())

    def _give(self, tracked: Tracked, cost: float) -> None:
        self._tenants.give(tracked.request.tenant, cost / tracked.request.tenant_weight)
        if self._between_adapters:
            self._of(tracked.request.tenant).give(tracked.adapter, cost)


class Counters:
    """What each of those who share was given. Whoever is served gets on; whoever comes begins with the least."""

    def __init__(self) -> None:
        self._given: dict[str, float] = {}
        self._floor = 0.0  # of the one that was served last: who comes when nobody waits begins there

    def __len__(self) -> int:
        return len(self._given)

    def __contains__(self, key: str) -> bool:
        return key in self._given

    def given(self, key: str) -> float:
        return self._given.get(key, self._floor)

    def give(self, key: str, cost: float) -> None:
        self._given[key] = self.given(key) + cost

    def serve(self, key: str) -> None:
        self._floor = self.given(key)

    def lift(self, key: str, waiting: Collection[str]) -> None:
        """`key` begins to wait beside those that do."""
        least = min(map(self.given, waiting), default=self._floor)
        self._given[key] = max(self._given.get(key, 0.0), least)
        if len(self._given) > _MAX_IDLE + len(waiting):
            # those that would be lifted above their counter anyway
            kept = {*waiting, key}
            self._given = {each: given for each, given in self._given.items() if given > least or each in kept}


def _over_share(rows: Mapping[str, int], weights: Mapping[str, float], mine: str, num_rows: int) -> str | None:
    """Who has most rows for its weight among those that keep their share when they give one up, if `mine` gets no more
    than its own with it. Both together hold in one direction only: nobody is sent back and forth."""
    each = num_rows / sum(weights.values())
    if rows.get(mine, 0) + 1 > max(1.0, each * weights[mine]):
        return None
    over = [key for key, count in rows.items() if key != mine and count > 1 and count - 1 >= each * weights[key]]
    return max(over, key=lambda key: (rows[key] / weights[key], key), default=None)


def _merged(lines: Mapping[str, Iterator[Tracked]], counters: Counters) -> Iterator[Tracked]:
    """One line of several, the head of whoever was given least in front; the counters move while it is read."""
    heads: list[tuple[float, int, str, Tracked]] = []
    for key, own in lines.items():
        first = next(own)
        heads.append((counters.given(key), first.seq, key, first))
    heapq.heapify(heads)
    while heads:
        _, _, key, tracked = heapq.heappop(heads)
        yield tracked
        following = next(lines[key], None)
        if following is not None:
            heapq.heappush(heads, (counters.given(key), following.seq, key, following))
