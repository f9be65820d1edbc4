"""What the front counts of placing: how often a request for an adapter goes where the one before it went."""

from __future__ import annotations

from collections.abc import Collection
from itertools import count
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge

from peft_serve.core import BASE, AdapterId

MAX_REMEMBERED: Final = 65_536
KINDS: Final = ("base", "first", "same", "moved", "again")


class PlacingFigures:
    """Owner of two series, of where each adapter was last, and of the replicas' numbers. Used on the event loop.

    Replicas come and go, and their names are new each time. So the label is a number: the smallest that no other
    replica has, which its successor takes over. There are no more than there were replicas at one time.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._placed = Counter(
            "peft_serve_placed_requests",
            "Requests that a replica took: for the base, for an adapter first asked for, on the replica that had the "
            "adapter's last one, on another one, or once more as the first replica was lost.",
            ["kind", "replica"],
            registry=registry,
        )
        self._replicas = Gauge("peft_serve_replicas", "Replicas of the engine that take requests.", registry=registry)
        self._last: dict[AdapterId, str] = {}
        self._numbers: dict[str, int] = {}  # by the replica's name

    def observe(self, adapter: AdapterId, replica: str, *, is_again: bool) -> None:
        """A replica took a request."""
        last = self._last.pop(adapter, None)
        if adapter != BASE:
            self._last[adapter] = replica
            if len(self._last) > MAX_REMEMBERED:
                del self._last[next(iter(self._last))]
        self._placed.labels(_kind(adapter, replica, last, is_again), self._number(replica)).inc()

    def set_replicas(self, names: Collection[str]) -> None:
        """These take requests; the numbers of all others are free."""
        self._replicas.set(len(names))
        self._numbers = {name: number for name, number in self._numbers.items() if name in names}
        for name in sorted(names):
            self._number(name)

    def _number(self, replica: str) -> int:
        """Its number, from now on if it has none."""
        if replica not in self._numbers:
            taken = set(self._numbers.values())
            self._numbers[replica] = number = next(each for each in count() if each not in taken)
            for kind in KINDS:
                self._placed.labels(kind, number)  # so that one that gets nothing is seen, too
        return self._numbers[replica]


def _kind(adapter: AdapterId, replica: str, last: str | None, is_again: bool) -> str:
    if is_again:
        return "again"
    if adapter == BASE:
        return "base"
    if last is None:
        return "first"
    return "same" if last == replica else "moved"
