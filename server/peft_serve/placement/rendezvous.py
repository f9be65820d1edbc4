"""Rendezvous hashing: an order of the replicas for each adapter that everybody reckons alike, without talking.

Highest random weight (Thaler and Ravishankar, IEEE/ACM Transactions on Networking 6(1), 1998). Each pair of adapter and
replica has a weight, and the order is by weight; so a replica that goes hands its adapters to whoever was next for each
of them, and one that comes takes its share of the others' and nothing else moves.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Final

_KEPT: Final = 2**20  # names in remembered orders: 8 MiB of references


def ranked(adapter: str, names: Iterable[str]) -> tuple[str, ...]:
    """The names, highest weight first. Does not depend on the order they come in, the process or the machine."""
    pair = blake2b(f"{len(adapter)}:{adapter}".encode(), digest_size=8)

    def weight(name: str) -> tuple[bytes, str]:
        hashed = pair.copy()
        hashed.update(name.encode())
        return hashed.digest(), name

    return tuple(sorted(names, key=weight, reverse=True))


class Ranks:
    """`ranked`, remembered for the adapters asked for last while the names stay the same. Not for several threads."""

    def __init__(self, *, max_kept: int = _KEPT) -> None:
        self._max_kept = max_kept
        self._names: list[str] = []
        self._orders: dict[str, tuple[str, ...]] = {}  # least recently used first

    def of(self, adapter: str, names: list[str]) -> tuple[str, ...]:
        """The names in the adapter's order."""
        if names != self._names:
            self._names = names
            self._orders.clear()
        order = self._orders.pop(adapter, None) or ranked(adapter, names)
        self._orders[adapter] = order
        while len(self._orders) > 1 and len(self._orders) * len(names) > self._max_kept:
            del self._orders[next(iter(self._orders))]
        return order
