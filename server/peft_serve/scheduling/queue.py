"""The queue: who waits, in order of arrival, for which adapter and for whom.

Holds the requests that are WAITING or LOADING. A preempted request comes back to its old place.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from peft_serve.core import AdapterId
from peft_serve.errors import QueueFull
from peft_serve.scheduling.tracked import Tracked

_NUM_FINISHES = 64  # finishes that the rate is measured over
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0


def _seq(tracked: Tracked) -> int:
    return tracked.seq


class WaitingQueue:
    """Waiting requests, oldest first, with an index by adapter, and one by tenant and adapter."""

    def __init__(self, *, max_queue: int) -> None:
        self._max_queue = max_queue
        self._order: list[Tracked] = []
        self._by_adapter: dict[AdapterId, dict[int, Tracked]] = {}
        self._by_tenant: dict[str, dict[AdapterId, dict[int, Tracked]]] = {}
        self.num_tokens = 0  # that those who wait want computed
        self._finished_s: deque[float] = deque(maxlen=_NUM_FINISHES)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Tracked]:
        return iter(self._order)

    @property
    def head(self) -> Tracked | None:
        return self._order[0] if self._order else None

    @property
    def adapters(self) -> tuple[AdapterId, ...]:
        """Adapters that someone waits for."""
        return tuple(self._by_adapter)

    @property
    def num_waiters(self) -> tuple[int, ...]:
        """How many wait for each of `adapters`."""
        return tuple(map(len, self._by_adapter.values()))

    def waiters(self, adapter: AdapterId) -> Sequence[Tracked]:
        """Who waits for the adapter, oldest first."""
        return sorted(self._by_adapter.get(adapter, {}).values(), key=_seq)

    def has_waiters(self, adapter: AdapterId) -> bool:
        return adapter in self._by_adapter

    @property
    def tenants(self) -> tuple[str, ...]:
        """Tenants of whom a request waits."""
        return tuple(self._by_tenant)

    def of_tenant(self, tenant: str) -> Mapping[AdapterId, Sequence[Tracked]]:
        """The tenant's requests by adapter, the oldest first."""
        return {
            adapter: sorted(waiters.values(), key=_seq) for adapter, waiters in self._by_tenant.get(tenant, {}).items()
        }

    def has_tenant(self, tenant: str) -> bool:
        return tenant in self._by_tenant

    def adapters_of(self, tenant: str) -> tuple[AdapterId, ...]:
        """Adapters that a request of the tenant waits for."""
        return tuple(self._by_tenant.get(tenant, ()))

    def require_room(self, now_s: float) -> None:
        """Raise `QueueFull` when the queue takes no more, with the time in which it should have emptied."""
        if len(self._order) < self._max_queue:
            return
        retry_s = self._retry_after_s(now_s)
        raise QueueFull(
            f"{len(self._order)} requests wait already (max_queue): try again in {retry_s:.0f} s",
            retry_after_s=retry_s,
        )

    def note_finish(self, now_s: float) -> None:
        """A request has finished: the rate of these is what `QueueFull` promises by."""
        self._finished_s.append(now_s)

    def push(self, tracked: Tracked) -> None:
        """Put a request at its place in the order of arrival."""
        insort(self._order, tracked, key=_seq)
        self.num_tokens += len(tracked.tokens)
        self._by_adapter.setdefault(tracked.adapter, {})[tracked.seq] = tracked
        own = self._by_tenant.setdefault(tracked.request.tenant, {})
        own.setdefault(tracked.adapter, {})[tracked.seq] = tracked

    def remove(self, tracked: Tracked) -> None:
        index = bisect_left(self._order, tracked.seq, key=_seq)
        assert self._order[index] is tracked, f"request {tracked.id} is not in the queue"
        del self._order[index]
        self.num_tokens -= len(tracked.tokens)
        waiters = self._by_adapter[tracked.adapter]
        del waiters[tracked.seq]
        if not waiters:
            del self._by_adapter[tracked.adapter]
        own = self._by_tenant[tracked.request.tenant]
        del own[tracked.adapter][tracked.seq]
        if not own[tracked.adapter]:
            del own[tracked.adapter]
        if not own:
            del self._by_tenant[tracked.request.tenant]

    def check(self) -> None:
        """Assert that order and index agree."""
        seqs = [tracked.seq for tracked in self._order]
        assert seqs == sorted(set(seqs)), "the queue is out of order"
        indexed = sorted(seq for waiters in self._by_adapter.values() for seq in waiters)
        assert indexed == seqs, "the queue's index by adapter is wrong"
        assert all(self._by_adapter.values()), "the queue's index keeps an empty entry"
        flows = [waiters for own in self._by_tenant.values() for waiters in own.values()]
        assert sorted(seq for waiters in flows for seq in waiters) == seqs, "the queue's index by tenant is wrong"
        assert all((*flows, *self._by_tenant.values())), "the queue's index by tenant keeps an empty entry"
        assert self.num_tokens == sum(len(tracked.tokens) for tracked in self._order), "tokens do not add up"

    def gap_s(self, now_s: float) -> float:
        """The mean time from one end of a request to the next, lately; 0 before there were two."""
        if len(self._finished_s) < 2:
            return 0.0
        return (now_s - self._finished_s[0]) / len(self._finished_s)

    def _retry_after_s(self, now_s: float) -> float:
        return min(max(len(self._order) * self.gap_s(now_s), _MIN_RETRY_S), _MAX_RETRY_S)
