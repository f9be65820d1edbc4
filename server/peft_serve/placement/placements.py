"""Placements: the ways of choosing whom to ask to serve a request, behind one protocol.

`rendezvous`, `random` and `least-loaded` are here, `residency` (the default) in its own file. None of them keeps count
of what it placed: all they go by is what the replicas are known to have.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nsmallest
from itertools import islice
from random import Random
from typing import Final, Literal, Protocol, get_args

from peft_serve.core import BASE, AdapterId
from peft_serve.placement.rendezvous import Ranks
from peft_serve.placement.replicas import ReplicaState

PlacementName = Literal["residency", "rendezvous", "least-loaded", "random"]

PLACEMENTS: Final[tuple[PlacementName, ...]] = get_args(PlacementName)

MOST_ASKED: Final = 8
"""Replicas that an order names at most: who is refused by all of them had better look at newer states."""


class Placement(Protocol):
    """Whom to ask for an adapter."""

    def order(self, adapter: AdapterId, replicas: Sequence[ReplicaState]) -> tuple[str, ...]:
        """The replicas to ask, best first; full ones are left out, and so is whoever comes behind the first few.

        Empty where every replica is full, and where there is none. `replicas` in any order, each name once.
        """
        ...


class Shuffled:
    """`random`: any order."""

    def __init__(self, rng: Random, *, most: int = MOST_ASKED) -> None:
        self._rng = rng
        self._most = most

    def order(self, adapter: AdapterId, replicas: Sequence[ReplicaState]) -> tuple[str, ...]:  # noqa: ARG002
        """See `Placement`."""
        names = [replica.name for replica in replicas if replica.num_ongoing < replica.max_ongoing]
        return tuple(self._rng.sample(names, min(self._most, len(names))))


class LeastLoaded:
    """`least-loaded`: whoever has the fewest requests for what it runs at once; of equals, any."""

    def __init__(self, rng: Random, *, most: int = MOST_ASKED) -> None:
        self._rng = rng
        self._most = most

    def order(self, adapter: AdapterId, replicas: Sequence[ReplicaState]) -> tuple[str, ...]:  # noqa: ARG002
        """See `Placement`."""
        draw = self._rng.random
        open_ones = [
            (one.num_ongoing / (one.max_running or one.max_ongoing), draw(), one.name)  # its load, without a call
            for one in replicas
            if one.num_ongoing < one.max_ongoing
        ]
        return tuple(name for _, _, name in nsmallest(self._most, open_ones))


class HashOrder:
    """`rendezvous`: by the adapter's hash, to the next rank when the first is full; the base to the least loaded."""

    def __init__(self, rng: Random, *, most: int = MOST_ASKED, ranks: Ranks | None = None) -> None:
        self._base = LeastLoaded(rng, most=most)
        self._ranks = Ranks() if ranks is None else ranks
        self._most = most

    def order(self, adapter: AdapterId, replicas: Sequence[ReplicaState]) -> tuple[str, ...]:
        """See `Placement`."""
        if adapter == BASE:
            return self._base.order(adapter, replicas)
        full = {replica.name for replica in replicas if replica.num_ongoing >= replica.max_ongoing}
        ranks = self._ranks.of(adapter, [replica.name for replica in replicas])
        return tuple(islice((name for name in ranks if name not in full), self._most))
