"""A simulated cluster: one router, its placement, and replicas; events in the order of their times.

The router knows of its own requests exactly and at once, and of residency and waits what replicas tell every
`report_s`, each at its own moment. So a placement sees what it would see in service.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import nan
from random import Random
from typing import Final

import numpy as np

from loadtest.popularity import Floats, Ints
from loadtest.simulation.replica import Replica, Requests, Shape
from loadtest.simulation.tier import Tier
from loadtest.simulation.times import Times
from loadtest.simulation.traffic import BASE_NUMBER, Traffic
from peft_serve.adapters.eviction import LeastRecentlyUsed
from peft_serve.core import BASE, AdapterId
from peft_serve.placement.placements import Placement
from peft_serve.placement.replicas import ReplicaState

STEP, LOAD, REPORT = range(3)
REFUSED: Final = -1
"""The replica of a request that every replica refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """What is simulated, but for the traffic and the placement."""

    num_replicas: int
    ranks: Sequence[int]  # of each adapter
    sizes: Sequence[int]  # bytes of each adapter
    device_bytes: float
    host_bytes: float
    knows_all: bool = True  # every adapter lies compiled on every replica's disk from the start
    report_s: float = 0.5
    shape: Shape = field(default_factory=Shape)
    times: Times = field(default_factory=Times)


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What came of each request, in the traffic's order, and of the replicas."""

    first_s: Floats  # when its first token came; NaN for refused ones
    end_s: Floats
    found_in: Ints  # one of `replica.FOUND_IN`, by number
    replicas: Ints  # who had it, or `REFUSED`
    busy_s: Floats  # of each replica


class Cluster:
    """Plays one traffic, once."""

    def __init__(self, spec: ClusterSpec, placement: Placement, traffic: Traffic) -> None:
        count = len(traffic)
        self._spec, self._placement = spec, placement
        self._times_s: list[float] = traffic.times_s.tolist()
        self._requests = Requests(
            adapters=traffic.adapters.tolist(),
            prompts=traffic.prompts.tolist(),
            answers=traffic.answers.tolist(),
            first_s=[nan] * count,
            end_s=[nan] * count,
            found_in=[0] * count,
        )
        self._names = [AdapterId(f"adapter-{number}") for number in range(len(spec.sizes))]
        self._numbers = {f"replica-{number}": number for number in range(spec.num_replicas)}
        self._replicas = [self._replica() for _ in range(spec.num_replicas)]
        self._labels = list(self._numbers)
        self._versions = [(0, 0)] * spec.num_replicas
        self._told = [(frozenset[AdapterId](), frozenset[AdapterId](), 0.0)] * spec.num_replicas
        self._states = [self._state(name, number) for name, number in self._numbers.items()]
        self._outdated: set[int] = set()
        self._events: list[tuple[float, int, int, int, int]] = []  # time, number, what, replica, adapter
        self._num_events = 0

    def _replica(self) -> Replica:
        spec = self._spec

        def tier(num_bytes: float) -> Tier:
            return Tier(num_bytes, LeastRecentlyUsed(), spec.sizes, self._names)

        tiers = tier(spec.device_bytes), tier(spec.host_bytes)
        return Replica(spec.shape, spec.times, spec.ranks, self._requests, *tiers, knows_all=spec.knows_all)

    def play(self, tick: Callable[[], None], *, ticks: int = 100) -> Played:
        """Every request, to its end. `tick` is called `ticks` times on the way."""
        replicas = np.full(len(self._times_s), REFUSED)
        if self._spec.report_s:
            for number in range(self._spec.num_replicas):
                self._push(self._spec.report_s * (number + 1) / self._spec.num_replicas, REPORT, number)
        due = 0
        for request, now_s in enumerate(self._times_s):
            self._run_until(now_s)
            replicas[request] = self._arrive(request, now_s)
            while due < ticks and (request + 1) * ticks >= (due + 1) * len(self._times_s):
                tick()
                due += 1
        self._run_until(None)
        for _ in range(ticks - due):
            tick()
        return Played(
            first_s=np.array(self._requests.first_s),
            end_s=np.array(self._requests.end_s),
            found_in=np.array(self._requests.found_in, dtype=np.int64),
            replicas=replicas,
            busy_s=np.array([replica.busy_s for replica in self._replicas]),
        )

    def _arrive(self, request: int, now_s: float) -> int:
        adapter = self._requests.adapters[request]
        order = self._placement.order(BASE if adapter == BASE_NUMBER else self._names[adapter], self._known())
        if not order:
            return REFUSED
        number = self._numbers[order[0]]
        if (load := self._replicas[number].accept(request)) is not None:
            self._push(now_s + load[1], LOAD, number, load[0])
        self._outdated.add(number)
        self._wake(number, now_s)
        return number

    def _run_until(self, limit_s: float | None) -> None:
        """Every event before `limit_s`; without one, until nobody has anything to do."""
        events = self._events
        while events and (limit_s is None or events[0][0] <= limit_s):
            now_s, _, what, number, adapter = heappop(events)
            if what == REPORT:
                if limit_s is not None:
                    self._hear(number)
                    self._push(now_s + self._spec.report_s, REPORT, number)
                continue
            replica = self._replicas[number]
            if what == STEP:
                before = replica.num_ongoing
                replica.end_step(now_s)
                if replica.num_ongoing != before:
                    self._outdated.add(number)
            elif (load := replica.loaded(adapter)) is not None:
                self._push(now_s + load[1], LOAD, number, load[0])
            self._wake(number, now_s)

    def _wake(self, number: int, now_s: float) -> None:
        replica = self._replicas[number]
        if not replica.is_stepping and (seconds := replica.begin_step()) is not None:
            self._push(now_s + seconds, STEP, number)

    def _push(self, time_s: float, what: int, number: int, adapter: int = 0) -> None:
        self._num_events += 1
        heappush(self._events, (time_s, self._num_events, what, number, adapter))

    # -- what the router knows

    def _known(self) -> list[ReplicaState]:
        for number in self._outdated:
            if not self._spec.report_s:
                self._hear(number)
            self._states[number] = self._state(self._labels[number], number)
        self._outdated.clear()
        return self._states

    def _hear(self, number: int) -> None:
        replica = self._replicas[number]
        version = replica.device.version, replica.host.version
        resident, on_host, _ = self._told[number]
        if version != self._versions[number]:
            self._versions[number] = version
            resident, on_host = replica.device.names(), replica.host.names()
        self._told[number] = resident, on_host, replica.wait_s()
        if self._spec.report_s:
            self._outdated.add(number)

    def _state(self, name: str, number: int) -> ReplicaState:
        resident, on_host, wait_s = self._told[number]
        return ReplicaState(
            name=name,
            num_ongoing=self._replicas[number].num_ongoing,
            max_ongoing=self._spec.shape.max_ongoing,
            resident=resident,
            on_host=on_host,
            wait_s=wait_s,
            max_running=self._spec.shape.max_rows,
        )


def placement_rng(seed: int) -> Random:
    """The randomness of a placement, apart from the traffic's."""
    return Random(f"placement {seed}")
