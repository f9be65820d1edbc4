"""Eviction: which adapter leaves a tier of memory first.

A policy owns the order in which the adapters of one tier would leave, from what it is told of their use. Budgets,
leases and pins are the tier's: it walks `victims` and takes the first ones that may go. Knows no tensors and no
threads; the tier keeps it behind its own lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from typing import Final, Literal, Protocol

from peft_serve.core import AdapterId

PolicyName = Literal["lru", "cost"]

LoadSeconds = Callable[[AdapterId, int], float]
"""Seconds that bringing back an adapter of so many bytes takes."""


class EvictionPolicy(Protocol):
    """The order in which the adapters of one tier leave."""

    def enter(self, adapter: AdapterId, num_bytes: int) -> None:
        """The adapter is in the tier from now on, and was asked for once."""

    def use(self, adapter: AdapterId) -> None:
        """The adapter was asked for again."""

    def rest(self, adapter: AdapterId) -> None:
        """A use of the adapter has lasted until now: it is as fresh as one that begins, and no further one."""

    def leave(self, adapter: AdapterId, *, is_evicted: bool) -> None:
        """The adapter is in the tier no more; `is_evicted`: to make room, not because somebody asked for it."""

    def victims(self) -> Iterator[AdapterId]:
        """Every adapter of the tier, the first to leave first. Tell the policy nothing while this is walked."""


class LeastRecentlyUsed:
    """`lru`: whoever was not used for the longest time leaves first."""

    def __init__(self) -> None:
        self._order: dict[AdapterId, None] = {}  # least recently used first

    def enter(self, adapter: AdapterId, num_bytes: int) -> None:  # noqa: ARG002  # every size alike
        """See `EvictionPolicy`."""
        assert adapter not in self._order, f"adapter {adapter} enters twice"
        self._order[adapter] = None

    def use(self, adapter: AdapterId) -> None:
        """See `EvictionPolicy`."""
        del self._order[adapter]
        self._order[adapter] = None

    def rest(self, adapter: AdapterId) -> None:
        """See `EvictionPolicy`."""
        self.use(adapter)

    def leave(self, adapter: AdapterId, *, is_evicted: bool) -> None:  # noqa: ARG002  # the reason does not matter
        """See `EvictionPolicy`."""
        del self._order[adapter]

    def victims(self) -> Iterator[AdapterId]:
        """See `EvictionPolicy`."""
        return iter(self._order)


class CostAware:
    """`cost`: whoever saves the least reload time for its bytes leaves first.

    GreedyDual-Size-Frequency (Cherkasova, HPL-98-69R1; GreedyDual-Size: Cao and Irani, USITS 1997). An adapter is
    worth L + uses * reload seconds / bytes at its last use. L is the worth of the one evicted last: whoever is not
    used is passed by the newcomers in the end, however popular it was. Equal worth leaves in order of use.
    """

    def __init__(self, load_seconds: LoadSeconds) -> None:
        self._load_seconds = load_seconds
        self._level = 0.0  # L
        self._sizes: dict[AdapterId, int] = {}
        self._uses: dict[AdapterId, int] = {}  # since the adapter entered
        self._worth = Ranking()

    def enter(self, adapter: AdapterId, num_bytes: int) -> None:
        """See `EvictionPolicy`."""
        assert adapter not in self._sizes, f"adapter {adapter} enters twice"
        self._sizes[adapter] = num_bytes
        self._uses[adapter] = 0
        self.use(adapter)

    def use(self, adapter: AdapterId) -> None:
        """See `EvictionPolicy`."""
        self._uses[adapter] += 1
        self.rest(adapter)

    def rest(self, adapter: AdapterId) -> None:
        """See `EvictionPolicy`."""
        num_bytes = self._sizes[adapter]
        saved = self._uses[adapter] * self._load_seconds(adapter, num_bytes) / max(1, num_bytes)
        self._worth.put(adapter, self._level + saved)

    def leave(self, adapter: AdapterId, *, is_evicted: bool) -> None:
        """See `EvictionPolicy`."""
        if is_evicted:  # one that was told to go says nothing about what the room is worth
            self._level = max(self._level, self._worth[adapter])
        del self._sizes[adapter], self._uses[adapter]
        self._worth.remove(adapter)

    def victims(self) -> Iterator[AdapterId]:
        """See `EvictionPolicy`."""
        return iter(self._worth)


class Ranking:
    """Adapters in ascending order of a number each; of equal ones, the one whose number was put first.

    A heap whose outdated entries are left where they are until they come to the top or outnumber the others: O(log n)
    to put, and O(k log k) to walk the first k without taking anything out.
    """

    _SLACK: Final = 32

    def __init__(self) -> None:
        self._entries: dict[AdapterId, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, AdapterId]] = []
        self._num_puts = 0

    def __getitem__(self, adapter: AdapterId) -> float:
        return self._entries[adapter][0]

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, adapter: AdapterId, number: float) -> None:
        """Set the adapter's number."""
        self._num_puts += 1
        self._entries[adapter] = (number, self._num_puts)
        heappush(self._heap, (number, self._num_puts, adapter))
        self._tidy()

    def remove(self, adapter: AdapterId) -> None:
        """Take the adapter out; it must be there."""
        del self._entries[adapter]
        self._tidy()

    def __iter__(self) -> Iterator[AdapterId]:
        """The adapters, lowest number first; the ranking must not change meanwhile."""
        heap = self._heap
        frontier = [(entry, 0) for entry in heap[:1]]
        while frontier:
            entry, place = heappop(frontier)
            if self._is_current(entry):
                yield entry[2]
            for child in (2 * place + 1, 2 * place + 2):
                if child < len(heap):
                    heappush(frontier, (heap[child], child))

    def _is_current(self, entry: tuple[float, int, AdapterId]) -> bool:
        return self._entries.get(entry[2]) == entry[:2]

    def _tidy(self) -> None:
        while self._heap and not self._is_current(self._heap[0]):
            heappop(self._heap)
        if len(self._heap) > 2 * len(self._entries) + self._SLACK:
            self._heap = [(*entry, adapter) for adapter, entry in self._entries.items()]
            heapify(self._heap)


def make_policy(name: PolicyName, load_seconds: LoadSeconds) -> EvictionPolicy:
    """A policy for one tier."""
    return LeastRecentlyUsed() if name == "lru" else CostAware(load_seconds)
