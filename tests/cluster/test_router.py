"""Where calls go: the placement's order, what a retry avoids, and the alpha API that all of it hangs on."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve.request_router")

import ray.serve.request_router as alpha
from ray.serve._private.common import RunningReplicaInfo
from ray.serve._private.replica import SERVE_BUILD_ASGI_APP_METHOD
from ray.serve.handle import DeploymentHandle

from peft_serve.cluster.launch import require_authentication
from peft_serve.cluster.router import PROMISED_S, RELIED_ON, AdapterRouter, States, placed
from peft_serve.cluster.routes import Route
from peft_serve.core import BASE, AdapterId
from peft_serve.placement.choosing import make_placement
from peft_serve.placement.replicas import ReplicaState
from tests.cluster.cluster_fakes import Clock

A = AdapterId("aaaa")


def state(name: str, num: int = 0, most: int = 4, **facts: Any) -> ReplicaState:
    return ReplicaState(name=name, num_ongoing=num, max_ongoing=most, **facts)


def order(route: Route, *states: ReplicaState) -> tuple[str, ...]:
    return placed(route, states, make_placement("rendezvous", Random(0)))


def test_an_adapter_goes_home_and_on_to_the_next_where_that_is_full() -> None:
    names = order(Route(adapter=A), *(state(name) for name in "xyz"))
    home = names[0]
    assert sorted(names) == ["x", "y", "z"]
    assert order(Route(adapter=A), *(state(name, 4 if name == home else 0) for name in "zyx")) == names[1:]
    assert order(Route(adapter=A), *(state(name, 4) for name in "xyz")) == ()


def test_the_base_goes_to_whoever_has_least() -> None:
    assert order(Route(), state("x", 3), state("y", 1), state("z", 2)) == ("y", "z", "x")


def test_a_retry_goes_elsewhere_and_back_only_where_there_is_nobody_else() -> None:
    home = order(Route(adapter=A), state("x"), state("y"))[0]
    (other,) = {"x", "y"} - {home}
    assert order(Route(adapter=A, avoided=home), state("x"), state("y")) == (other,)
    assert order(Route(adapter=A, avoided=home), state(home)) == (home,)


def test_a_call_for_one_replica_goes_there_however_full_it_is() -> None:
    assert order(Route(only="y"), state("x"), state("y", 4)) == ("y",)
    assert order(Route(only="gone"), state("x")) == ("x",)


def test_where_a_request_was_sent_its_adapter_is_expected_for_a_while() -> None:
    clock = Clock()
    states = States(clock)
    states.promise("x", A)
    states.promise("x", BASE)
    assert states.state("x", A, {}, 1, 4) == state("x", 1, on_host=frozenset({A}))
    assert states.state("y", A, {}, 1, 4) == state("y", 1)
    clock.now += PROMISED_S + 1
    assert states.state("x", A, {}, 1, 4) == state("x", 1)


def test_what_a_replica_tells_counts_beside_what_was_sent() -> None:
    told = {"num_ongoing": 7, "max_ongoing": 9, "resident": [A], "on_host": ["b"], "wait_s": 2.0}
    states = States(Clock())
    assert states.state("x", A, told, None, 4) == state("x", 7, 9, resident=frozenset({A}), wait_s=2.0)
    assert states.state("x", A, told, 3, 4).num_ongoing == 3
    assert states.state("x", AdapterId("b"), told, 3, 4).on_host == {"b"}


@dataclass
class FakeReplica:
    """As much of Serve's `RunningReplica` as is read."""

    name: str
    routing_stats: dict[str, Any] = field(default_factory=dict)

    @property
    def replica_id(self) -> Any:
        return SimpleNamespace(unique_id=self.name)


def pending(route: Route) -> Any:
    return SimpleNamespace(
        metadata=SimpleNamespace(multiplexed_model_id=route.text()),
        routing_context=SimpleNamespace(should_backoff=False),
    )


def a_router() -> AdapterRouter:
    router = AdapterRouter.__new__(AdapterRouter)
    router._replica_queue_len_cache = SimpleNamespace(get=lambda _: None)
    router.initialize_state(max_ongoing=4, placement="residency", seed=1)
    return router


async def test_serve_is_given_one_rank_for_each_replica() -> None:
    router, replicas = a_router(), [FakeReplica(name) for name in "xyz"]
    asked = pending(Route(adapter=A))
    ranks = await router.choose_replicas(replicas, asked)
    assert asked.routing_context.should_backoff, "or Serve asks again at once, for ever"
    assert sorted(replica.name for (replica,) in ranks) == ["x", "y", "z"]
    home = ranks[0][0]
    router.on_request_routed(asked, home.replica_id, None)
    for _ in range(3):
        assert (await router.choose_replicas(replicas[::-1], pending(Route(adapter=A))))[0] == [home]
    for replica in replicas:
        replica.routing_stats = {"num_ongoing": 4}
    assert await router.choose_replicas(replicas, pending(Route(adapter=A))) == []
    assert await router.choose_replicas(replicas, None) == [replicas]


@pytest.mark.parametrize("name", RELIED_ON)
def test_the_alpha_api_has_the_signatures_that_are_relied_on(name: str) -> None:
    owner, method = name.split(".")
    parameters = inspect.signature(getattr(getattr(alpha, owner), method)).parameters.values()
    kinds = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    assert f"({', '.join(kinds.get(each.kind, '') + each.name for each in parameters)})" == RELIED_ON[name]


def test_the_alpha_api_has_what_else_is_read() -> None:
    assert isinstance(alpha.RunningReplica.routing_stats, property)
    assert isinstance(alpha.RunningReplica.replica_id, property)
    assert "unique_id" in alpha.ReplicaID.__dataclass_fields__
    assert isinstance(alpha.RequestRouter.replica_queue_len_cache, property)
    assert {"metadata", "routing_context"} <= alpha.PendingRequest.__dataclass_fields__.keys()
    assert "routing_stats" in RunningReplicaInfo.__dataclass_fields__
    told = inspect.signature(DeploymentHandle.broadcast).parameters
    assert list(told) == ["self", "method_name", "args", "kwargs"]
    assert SERVE_BUILD_ASGI_APP_METHOD == "__serve_build_asgi_app__", "an ingress makes its application once started"


@pytest.mark.parametrize(
    ("address", "environ"),
    [(None, {"RAY_AUTH_MODE": "disabled"}), ("auto", {}), ("10.0.0.1:6379", {"RAY_AUTH_MODE": "disabled"})],
)
def test_a_cluster_that_takes_orders_from_anybody_is_refused(address: str | None, environ: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="RAY_AUTH_MODE=token"):
        require_authentication(address, environ)


@pytest.mark.parametrize(("address", "environ"), [(None, {}), ("auto", {"RAY_AUTH_MODE": "token"})])
def test_a_cluster_that_asks_for_a_token_is_not(address: str | None, environ: dict[str, str]) -> None:
    require_authentication(address, environ)
