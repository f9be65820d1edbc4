"""The front's engine over scripted replicas: what is passed on, retried, refused and called back."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from peft_serve.cluster.figures import PlacingFigures
from peft_serve.cluster.remote_engine import Bounds
from peft_serve.cluster.replicas import ReplicaLost
from peft_serve.cluster.wire import Accepted, packed
from peft_serve.core import BASE, AdapterId, FinishEvent, FinishReason, PromptEvent, RequestId
from peft_serve.engine.client import EngineClient
from peft_serve.engine.snapshot import EngineState
from peft_serve.errors import AdapterUnavailable, DeadlineMissed, InvalidParameter, QueueFull, Unavailable
from tests.cluster.cluster_fakes import (
    Act,
    Clock,
    ScriptedReplicas,
    answer,
    engine_over,
    finish,
    report,
    request,
    settled,
    token,
)

WHOLE = answer([token(0)], [token(1), finish()])


async def test_events_come_back_as_the_engine_gave_them() -> None:
    engine, _ = await engine_over(ScriptedReplicas([WHOLE]))
    client = EngineClient(engine, asyncio.get_running_loop())
    assert [event async for event in client.submit(request())] == [token(0), token(1), finish()]
    assert client.num_open == engine.num_open == 0


@pytest.mark.parametrize("how", [[], [Accepted(replica="one")]])
async def test_a_replica_lost_before_anything_streamed_costs_the_caller_nothing(how: list[Act]) -> None:
    again = answer([token(0, "r~1")], [token(1, "r~1"), finish("r~1")], replica="two")
    replicas = ScriptedReplicas([[*how, ReplicaLost("killed")], again])
    engine, events = await engine_over(replicas)
    engine.submit(request())
    await settled(engine)
    assert events == [token(0), token(1), finish()]
    assert [ask.request.id for ask in replicas.asks] == ["r", "r~1"], "the first may still run somewhere"
    assert replicas.avoided == [None, "one" if how else None]


async def test_an_answer_that_had_begun_goes_on_where_the_same_tokens_come_again() -> None:
    again = answer([token(0, "r~1"), token(1, "r~1")], [token(2, "r~1"), finish("r~1")], replica="two")
    replicas = ScriptedReplicas([[*WHOLE[:2], ReplicaLost("killed")], again])
    engine, events = await engine_over(replicas)
    engine.submit(request(arrival_s=0.0, deadline_s=2000.0))
    await settled(engine)
    assert events == [token(0), token(1), token(2), finish()]
    first, second = replicas.asks
    assert first.request.sampling.seed == second.request.sampling.seed == 7
    assert (first.request.deadline_s, second.request.deadline_s) == (2000.0, None)


async def test_an_answer_that_was_stopped_is_whole_though_its_replica_is_lost() -> None:
    go = asyncio.Event()
    replicas = ScriptedReplicas([[*WHOLE[:2], go, ReplicaLost("killed")]])
    engine, events = await engine_over(replicas)
    engine.submit(request())
    await asyncio.sleep(0.01)
    engine.cancel(RequestId("r"), FinishReason.STOP)
    go.set()
    await settled(engine)
    assert events == [token(0), FinishEvent(request=RequestId("r"), reason=FinishReason.STOP)]


@pytest.mark.parametrize(
    "again",
    [
        [ReplicaLost("killed")],
        answer([token(1, "r~1"), finish("r~1")]),
        answer([finish("r~1")]),
        answer([PromptEvent(request=RequestId("r~1"), logprobs=(), tops=())], [token(0, "r~1"), finish("r~1")]),
    ],
    ids=["lost", "another token", "an end", "something else"],
)
async def test_an_answer_that_does_not_come_again_ends_with_an_error(again: list[Act]) -> None:
    replicas = ScriptedReplicas([[*WHOLE[:2], ReplicaLost("killed")], again])
    engine, events = await engine_over(replicas)
    engine.submit(request())
    await settled(engine)
    first, last = events
    assert first == token(0)
    assert isinstance(last, FinishEvent)
    assert last.reason is FinishReason.FAILED
    assert isinstance(last.error, Unavailable)
    assert "not complete" in last.error.message


@pytest.mark.parametrize(
    "script", [[ReplicaLost("killed")], [], WHOLE[:1]], ids=["killed", "without a sign", "broken off"]
)
async def test_a_request_is_tried_twice_and_no_more(script: list[Act]) -> None:
    replicas = ScriptedReplicas([script, script, WHOLE])
    engine, events = await engine_over(replicas)
    engine.submit(request())
    await settled(engine)
    (last,) = events
    assert isinstance(last, FinishEvent)
    assert isinstance(last.error, Unavailable)
    assert last.error.retry_after_s
    assert len(replicas.calls) == 2


async def test_an_engine_that_is_dead_is_a_replica_lost_and_a_broken_adapter_is_not() -> None:
    dead = answer([finish(error=Unavailable("the server is dead"))])
    replicas = ScriptedReplicas([dead, answer([token(0, "r~1"), finish("r~1")], replica="two")])
    engine, events = await engine_over(replicas)
    engine.submit(request())
    await settled(engine)
    assert events == [token(0), finish()]
    assert replicas.avoided[1] == "one"
    broken = answer([finish(error=AdapterUnavailable("its files are damaged"))])
    replicas = ScriptedReplicas([broken])
    engine, events = await engine_over(replicas)
    engine.submit(request())
    await settled(engine)
    assert isinstance(events[0], FinishEvent)
    assert isinstance(events[0].error, AdapterUnavailable)


async def test_refusals_come_back_as_themselves() -> None:
    error = InvalidParameter("top_k: too many", param="top_k")
    engine, events = await engine_over(ScriptedReplicas([answer([finish(error=error)]), [QueueFull("too many")]]))
    engine.submit(request())
    await settled(engine)
    engine.submit(request())
    await settled(engine)
    told = [event.error for event in events if isinstance(event, FinishEvent)]
    assert [type(each) for each in told] == [InvalidParameter, QueueFull]
    assert vars(told[0]) == vars(error)


async def test_the_bound_is_exact() -> None:
    go = asyncio.Event()
    names = [f"r{i}" for i in range(6)]
    scripts = [[Accepted(replica="one"), go, packed([finish(name)])] for name in names]
    engine, events = await engine_over(ScriptedReplicas(scripts), bounds=Bounds(max_ongoing=2, max_queue=1))
    for name in names[:5]:
        engine.submit(request(name))
    with pytest.raises(QueueFull, match="all 5 requests are under way that 2 replicas and"):
        engine.submit(request("r5"))
    go.set()
    await settled(engine)
    assert events == [finish(name) for name in names[:5]]
    engine.submit(request("r5"))
    await settled(engine)
    assert len(events) == 6


async def test_who_drains_takes_no_more_and_ends_what_is_open() -> None:
    go = asyncio.Event()
    engine, events = await engine_over(
        ScriptedReplicas([[Accepted(replica="one"), go, packed([finish("r0")])]]),
        bounds=Bounds(max_ongoing=2, max_queue=1),
    )
    engine.submit(request("r0"))
    engine.close_admission()
    assert engine.snapshot().state is EngineState.DRAINING
    with pytest.raises(Unavailable, match="stopping"):
        engine.submit(request("r1"))
    assert engine.num_open == 1
    go.set()
    await settled(engine)
    assert (events, engine.num_open) == ([finish("r0")], 0)


async def test_without_a_replica_nothing_is_admitted() -> None:
    replicas = ScriptedReplicas(told=[])
    engine, _ = await engine_over(replicas)
    assert engine.snapshot().state is EngineState.STARTING
    with pytest.raises(Unavailable, match="no replica"):
        engine.submit(request())
    replicas.told = [report("three", checked_for="another base")]
    await engine.look()
    assert engine.has_only_strangers
    with pytest.raises(Unavailable):
        engine.submit(request())


async def test_replicas_that_do_not_answer_in_time_leave_what_is_known() -> None:
    replicas = ScriptedReplicas()
    engine, _ = await engine_over(replicas)
    replicas.is_silent = True
    with pytest.raises(ReplicaLost):
        await engine.look()
    assert engine.snapshot().state is EngineState.RUNNING


async def test_a_caller_that_goes_away_calls_the_request_back() -> None:
    replicas = ScriptedReplicas([[Accepted(replica="one"), asyncio.Event()]])
    engine, events = await engine_over(replicas)
    client = EngineClient(engine, asyncio.get_running_loop())
    stream = client.submit(request())
    await asyncio.sleep(0.01)
    stream.close()
    await settled(engine)
    assert replicas.calls[0].is_cancelled
    assert events == []


@pytest.mark.parametrize("is_early", [True, False])
async def test_a_stop_string_ends_the_request_where_it_runs(is_early: bool) -> None:
    placed, go = asyncio.Event(), asyncio.Event()
    replicas = ScriptedReplicas([[placed, Accepted(replica="two"), go, packed([finish()])]])
    engine, events = await engine_over(replicas)
    engine.submit(request())
    if not is_early:
        placed.set()
        await asyncio.sleep(0.01)
    engine.cancel(RequestId("r"), FinishReason.STOP)
    placed.set()
    await asyncio.sleep(0.01)
    assert replicas.orders == [("stop", "two", "r", FinishReason.STOP)]
    go.set()
    await settled(engine)
    assert events == [finish()], "its last event still comes"


async def test_a_request_that_no_replica_has_by_its_deadline_is_refused() -> None:
    clock = Clock()
    replicas = ScriptedReplicas([[asyncio.Event()]])
    engine, events = await engine_over(replicas, clock=clock)
    engine.submit(request(arrival_s=clock.now, deadline_s=clock.now + 0.02))
    await settled(engine)
    assert isinstance(events[0], FinishEvent)
    assert isinstance(events[0].error, DeadlineMissed)
    assert replicas.calls[0].is_cancelled
    replicas.told = [report("one", wait_s=5.0), report("two", wait_s=3.0)]
    await engine.look()
    with pytest.raises(DeadlineMissed, match="expected in 3 s"):
        engine.submit(request(arrival_s=clock.now, deadline_s=clock.now + 2.0))


async def test_replicas_that_come_later_are_told_what_is_pinned() -> None:
    replicas, one = ScriptedReplicas(), AdapterId("sha256:one")
    engine, _ = await engine_over(replicas)
    engine.homes_of = lambda adapter: {adapter: "folder"}
    engine.load(one)
    engine.set_pinned(one, pinned=True)
    await asyncio.sleep(0.01)
    assert replicas.orders == [("load", one, {one: "folder"}), ("pin", one)]
    assert engine.snapshot().pinned == {one}
    await engine.look()
    assert len(replicas.orders) == 2, "nobody is new"
    replicas.told.append(report("three"))
    await engine.look()
    assert replicas.orders[2:] == [("pin", one)]
    engine.set_pinned(one, pinned=False)
    engine.unload(one)
    await asyncio.sleep(0.01)
    assert replicas.orders[3:] == [("unpin", one), ("unload", one)]


async def test_the_snapshot_is_that_of_all_and_of_what_waits_here() -> None:
    a, b = AdapterId("a"), AdapterId("b")
    replicas = ScriptedReplicas([[asyncio.Event()]])
    replicas.told = [
        report("one", num_running=2, num_waiting=1, waiting_adapters=(a,), num_waiters=(1,), wait_s=4.0, num_slots=4),
        report(
            "two", num_running=3, num_waiting=4, waiting_adapters=(b, a), num_waiters=(2, 2), wait_s=1.0, num_slots=3
        ),
        report("dead", state=EngineState.DEAD, stalled_s=90.0),
        report("stranger", checked_for="another base", num_running=100),
    ]
    engine, _ = await engine_over(replicas)
    engine.submit(request())
    await asyncio.sleep(0)
    seen = engine.snapshot()
    assert (seen.state, seen.num_running, seen.num_waiting) == (EngineState.RUNNING, 5, 6)
    assert dict(zip(seen.waiting_adapters, seen.num_waiters, strict=True)) == {a: 3, b: 2}
    assert (seen.wait_s, seen.stalled_s) == (1.0, 0.0)
    assert (seen.num_slots, seen.num_pinnable) == (4 + 3 + 4, 2), "a pin takes a slot on every replica"
    engine.cancel(RequestId("r"), FinishReason.CANCELLED)
    await settled(engine)


def placed(registry: CollectorRegistry) -> dict[str, dict[str, float]]:
    """Requests by the replica's number and the kind."""
    found: dict[str, dict[str, float]] = {}
    for family in registry.collect():
        for sample in family.samples:
            if sample.name == "peft_serve_placed_requests_total":
                found.setdefault(sample.labels["replica"], {})[sample.labels["kind"]] = sample.value
    return found


def test_a_replica_that_comes_takes_the_number_of_one_that_is_gone() -> None:
    registry = CollectorRegistry()
    figures = PlacingFigures(registry)
    figures.set_replicas(["a", "b"])
    assert set(placed(registry)) == {"0", "1"}, "one that got nothing is seen, too"
    for generation in range(20):  # a rolling update, again and again
        figures.set_replicas(["b", f"new {generation}"])
        figures.observe(BASE, f"new {generation}", is_again=False)
        figures.observe(BASE, "b", is_again=False)
    told = placed(registry)
    assert {number: kinds["base"] for number, kinds in told.items()} == {"0": 20, "1": 20}
    figures.set_replicas(["b", "c", "d"])
    assert set(placed(registry)) == {"0", "1", "2"}


async def test_what_is_told_of_placing_is_where_requests_went() -> None:
    one, registry = "sha256:one", CollectorRegistry()
    scripts = [
        answer([finish()]),
        answer([finish()], replica="two"),
        answer([finish()], replica="two"),
        answer([finish()], replica="one"),
        [Accepted(replica="one"), ReplicaLost("killed")],
        answer([finish("r~1")], replica="two"),
    ]
    engine, _ = await engine_over(ScriptedReplicas(scripts), registry=registry)
    for adapter in ("base", one, one, one, one):
        engine.submit(request(adapter=adapter))
        await settled(engine)
    told = placed(registry)
    assert told == {
        "0": {"base": 1, "first": 0, "same": 1, "moved": 1, "again": 0},
        "1": {"base": 0, "first": 1, "same": 1, "moved": 0, "again": 1},
    }
    assert registry.get_sample_value("peft_serve_replicas") == 2


async def test_the_trial_of_an_upload_is_no_placed_request() -> None:
    one, registry = "sha256:one", CollectorRegistry()
    scripts = [answer([finish()]) for _ in range(4)]
    engine, _ = await engine_over(ScriptedReplicas(scripts), registry=registry)
    for adapter, is_trial in ((one, True), ("base", True), (one, False), (one, False)):
        engine.submit(replace(request(adapter=adapter), is_trial=is_trial))
        await settled(engine)
    assert placed(registry)["0"] == {"base": 0, "first": 1, "same": 1, "moved": 0, "again": 0}
