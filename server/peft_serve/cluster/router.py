"""The request router: Serve asks it which replica a call goes to, and it asks a placement.

Everything here leans on an API of Serve that is alpha; `RELIED_ON` writes down what, and a test compares. It is made by
Serve in whatever process holds a handle, and knows of replicas what they last told (`Replica.routing_stats`, a second
old) and how many calls this process has sent to each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from random import Random
from types import MappingProxyType
from typing import Any, Final

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from peft_serve.cluster.routes import Route
from peft_serve.core import BASE, AdapterId
from peft_serve.placement.choosing import make_placement
from peft_serve.placement.placements import Placement, PlacementName
from peft_serve.placement.replicas import ReplicaState

PROMISED_S: Final = 10.0
"""So long an adapter counts as being where a request for it was sent, whatever the replica has told since."""

MAX_PROMISED: Final = 65_536

RELIED_ON: Final[Mapping[str, str]] = MappingProxyType(
    {
        "RequestRouter.__init__": "(self, deployment_id, handle_source, self_actor_id, self_actor_handle, "
        "use_replica_queue_len_cache, get_curr_time_s, create_replica_wrapper_func, initial_backoff_s, "
        "backoff_multiplier, max_backoff_s, *args, **kwargs)",
        "RequestRouter.choose_replicas": "(self, candidate_replicas, pending_request)",
        "RequestRouter.initialize_state": "(self, **kwargs)",
        "RequestRouter.on_request_routed": "(self, pending_request, replica_id, result)",
        "RequestRouter.on_replica_actor_died": "(self, replica_id)",
    }
)
"""The signatures, by names alone: annotations and defaults may change."""


class States:
    """What is known of replicas: the pure part. Used on the router's event loop."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._promised: dict[tuple[str, AdapterId], float] = {}  # until when; the oldest first

    def promise(self, replica: str, adapter: AdapterId) -> None:
        """A request for the adapter goes there: soon the adapter is."""
        if adapter == BASE:
            return
        self._promised.pop((replica, adapter), None)
        self._promised[replica, adapter] = self._clock() + PROMISED_S
        if len(self._promised) > MAX_PROMISED:
            del self._promised[next(iter(self._promised))]

    def state(
        self, name: str, adapter: AdapterId, told: Mapping[str, Any], num_sent: int | None, max_ongoing: int
    ) -> ReplicaState:
        """A replica, as far as it matters for this adapter. `num_sent` counts this process' calls, if it knows."""
        has = frozenset({adapter})
        is_promised = self._promised.get((name, adapter), -1.0) >= self._clock()
        return ReplicaState(
            name=name,
            num_ongoing=told.get("num_ongoing", 0) if num_sent is None else num_sent,
            max_ongoing=told.get("max_ongoing", max_ongoing),
            resident=has if adapter in told.get("resident", ()) else frozenset(),
            on_host=has if is_promised or adapter in told.get("on_host", ()) else frozenset(),
            wait_s=told.get("wait_s", 0.0),
            max_running=told.get("max_running"),
        )


def placed(route: Route, states: Sequence[ReplicaState], placement: Placement) -> tuple[str, ...]:
    """The replicas to try for a route, best first; none: not now."""
    names = [state.name for state in states]
    if route.only:
        return (route.only,) if route.only in names else tuple(names[:1])  # it is gone, and so is what it is about
    order = placement.order(route.adapter, states)
    return tuple(name for name in order if name != route.avoided) or order


class AdapterRouter(RequestRouter):
    """See the module. `initialize_state` is given the keywords of Serve's `request_router_kwargs`."""

    _states: States
    _placement: Placement
    _max_ongoing: int

    def initialize_state(self, **kwargs: Any) -> None:
        """`max_ongoing` requests at a replica, and the `placement` of this name."""
        self._states = States(time.monotonic)
        self._max_ongoing = kwargs["max_ongoing"]
        name: PlacementName = kwargs["placement"]
        self._placement = make_placement(name, Random(kwargs.get("seed")))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One rank for each replica. None where all are full: Serve asks again in a moment."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # else Serve asks again at once, without end
        route = Route.parse(pending_request.metadata.multiplexed_model_id)
        known = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        states = [self._state(name, replica, route.adapter) for name, replica in known.items()]
        return [[known[name]] for name in placed(route, states, self._placement)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Remember what was sent where: replicas tell of themselves once a second."""
        super().on_request_routed(pending_request, replica_id, result)
        route = Route.parse(pending_request.metadata.multiplexed_model_id)
        self._states.promise(replica_id.unique_id, route.adapter)

    def _state(self, name: str, replica: RunningReplica, adapter: AdapterId) -> ReplicaState:
        num_sent = self.replica_queue_len_cache.get(replica.replica_id)
        return self._states.state(name, adapter, replica.routing_stats, num_sent, self._max_ongoing)
