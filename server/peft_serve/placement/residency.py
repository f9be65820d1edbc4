"""`residency`: an adapter goes where it is, a cold one home by its hash, a hot one also to the next rank.

- *Home.* The adapter's hash order says who is to have it, so that routers agree without talking.
- *Where it is.* A replica that has it on its device, or else in its host memory, comes before one that would load it.
- *Hot.* Where everybody who has it is saturated, the first in its order who has it not and is at ease gets it too; so
  an adapter has as many copies as it needs, and where nobody is at ease none is made: a load would only be more work.
- *Hysteresis.* Saturated is above the upper bounds, at ease is below the lower ones. Between the two nothing is moved:
  copies share the load. Below, the first in the order has it all, and the other copies age until they are evicted.
  What is remembered is in the replicas' tiers alone, so that every router decides alike and a new one knows as much.
- *Cold.* An adapter that nobody has goes to the first in its order who has no more than `spread` times the mean of the
  requests (consistent hashing with bounded loads, Mirrokni, Thorup and Zadimoghaddam, arXiv:1608.01350).
- *The base* is everywhere: the least loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil
from random import Random

from peft_serve.core import BASE, AdapterId
from peft_serve.placement.placements import MOST_ASKED, LeastLoaded
from peft_serve.placement.rendezvous import Ranks, ranked
from peft_serve.placement.replicas import ReplicaState


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """When a replica is saturated, when it is at ease again, and how far a cold adapter's may be above the mean."""

    saturated_load: float = 1.0  # requests over those that run at once
    easy_load: float = 0.5
    saturated_wait_s: float = 1.0
    easy_wait_s: float = 0.5
    spread: float = 1.25

    def __post_init__(self) -> None:
        if not 0 < self.easy_load <= self.saturated_load:
            told = f"easy_load is {self.easy_load} and saturated_load {self.saturated_load}"
            raise ValueError(f"{told}: both are above zero, and the first is not above the second")
        if not 0 < self.easy_wait_s <= self.saturated_wait_s:
            told = f"easy_wait_s is {self.easy_wait_s} and saturated_wait_s {self.saturated_wait_s}"
            raise ValueError(f"{told}: both are above zero, and the first is not above the second")
        if self.spread < 1:
            raise ValueError(f"spread is {self.spread}: below 1 there is nobody whose load is below the bound")

    def is_saturated(self, replica: ReplicaState) -> bool:
        """Whether it is better not to ask it for what others could do."""
        return replica.load >= self.saturated_load or replica.wait_s >= self.saturated_wait_s

    def is_easy(self, replica: ReplicaState) -> bool:
        """Whether it has room for more than what it has."""
        return replica.load < self.easy_load and replica.wait_s < self.easy_wait_s


class ResidencyAware:
    """See the module."""

    def __init__(
        self, rng: Random, *, bounds: Bounds | None = None, most: int = MOST_ASKED, ranks: Ranks | None = None
    ) -> None:
        self._base = LeastLoaded(rng, most=most)
        self._bounds = Bounds() if bounds is None else bounds
        self._ranks = Ranks() if ranks is None else ranks
        self._most = most

    def order(self, adapter: AdapterId, replicas: Sequence[ReplicaState]) -> tuple[str, ...]:
        """See `Placement`."""
        if adapter == BASE:
            return self._base.order(adapter, replicas)
        names: dict[str, None] = {}
        for replica in self._line(adapter, replicas):
            names[replica.name] = None
            if len(names) == self._most:
                break
        return tuple(names)

    def _line(self, adapter: AdapterId, replicas: Sequence[ReplicaState]) -> Iterator[ReplicaState]:
        """Everybody who is not full, best first, some twice; reckoned no farther than it is read."""
        those = [one for one in replicas if adapter in one.resident or adapter in one.on_host]
        warm = _ranked(adapter, those)
        warm.sort(key=lambda one: adapter not in one.resident)
        chosen = self._chosen(warm)
        yield from chosen
        ranks = self._ranks.of(adapter, [replica.name for replica in replicas])
        known = {replica.name: replica for replica in replicas if not replica.is_full}
        if not warm:
            bound = self._bound(replicas) if replicas else 0
            yield from islice((one for one in _in_order(ranks, known) if one.num_ongoing < bound), 1)
        elif not chosen:
            yield from islice((one for one in _in_order(ranks, known) if self._bounds.is_easy(one)), 1)
        yield from sorted(warm, key=_load)
        yield from _in_order(ranks, known)

    def _chosen(self, warm: Sequence[ReplicaState]) -> list[ReplicaState]:
        """Whoever of those who have it is to serve it; nobody where all of them are saturated."""
        for replica in warm:
            if self._bounds.is_easy(replica):
                return [replica]
        least = min(warm, key=_load, default=None)
        return [] if least is None or self._bounds.is_saturated(least) else [least]

    def _bound(self, replicas: Sequence[ReplicaState]) -> int:
        """The requests at which a replica gets no cold adapter; the request that is to be placed is in the mean."""
        total = 1 + sum(replica.num_ongoing for replica in replicas)
        return ceil(self._bounds.spread * total / len(replicas))


def _ranked(adapter: AdapterId, those: Sequence[ReplicaState]) -> list[ReplicaState]:
    """Those who are not full, in the adapter's order: that of all the others, without them."""
    known = {replica.name: replica for replica in those if not replica.is_full}
    return [*_in_order(ranked(adapter, known), known)]


def _in_order(ranks: Sequence[str], known: Mapping[str, ReplicaState]) -> Iterator[ReplicaState]:
    return (known[name] for name in ranks if name in known)


def _load(replica: ReplicaState) -> tuple[float, float]:
    return replica.load, replica.wait_s
