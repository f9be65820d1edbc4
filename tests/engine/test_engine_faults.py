"""Faults at every place of a step, with fakes that raise there: who fails, who goes on, and when the engine dies."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from peft_serve.adapters.host_cache import HostCache
from peft_serve.adapters.primitives import Adapter
from peft_serve.core import AdapterId, Event, FinishEvent, FinishReason, Step, StepResult, TokenEvent
from peft_serve.engine.client import EngineClient
from peft_serve.engine.snapshot import EngineState
from peft_serve.engine.stepping import MOST_FAILED
from peft_serve.errors import AdapterUnavailable, Internal, Unavailable
from tests.engine.test_engine import LIMITS, NUM_BLOCKS, House, collect, compiled, request
from tests.scheduling.fake_model import alone

A, B, C = (AdapterId(f"sha256:{i}") for i in range(3))


@pytest.fixture
def house() -> Iterator[House]:
    made = House()
    yield made
    made.engine.stop()


def client_of(house: House) -> EngineClient:
    client = EngineClient(house.engine, asyncio.get_running_loop())
    house.engine.start()
    return client


def end(events: list[Event]) -> FinishEvent:
    assert isinstance(events[-1], FinishEvent)
    return events[-1]


def failing_rows(house: House, is_bad: Callable[[str], bool]) -> Callable[[Step], StepResult]:
    def run(step: Step) -> StepResult:
        result = plain(step)
        rows = [
            replace(row, token=None, failure=Internal("not this one")) if is_bad(row.request) else row
            for row in result.rows
        ]
        return replace(result, rows=tuple(rows))

    plain = house.run
    return run


async def test_a_row_that_fails_ends_its_request_and_nobody_elses(house: House) -> None:
    house.run = failing_rows(house, lambda name: int(name[1:]) % 5 == 2)
    client = client_of(house)
    asked = [request(i, (A, B, C)[i % 3], seed=i) for i in range(20)]
    answers = await asyncio.gather(*(collect(client, one) for one in asked))
    for i, (one, events) in enumerate(zip(asked, answers, strict=True)):
        if i % 5 == 2:
            assert end(events).reason is FinishReason.FAILED
            assert isinstance(end(events).error, Internal)
            continue
        footprint = compiled(one.adapter).footprint(is_encoder_decoder=False)
        want = alone(one, footprint, LIMITS, capacity=NUM_BLOCKS - 1, cross_capacity=0)
        assert tuple(e.token for e in events if isinstance(e, TokenEvent)) == want.tokens
    house.scheduler.check()
    assert house.scheduler.snapshot().num_running == 0


async def test_what_a_failed_request_computed_is_found_by_nobody(house: House) -> None:
    """Its earlier chunks may be what it failed of; they were labelled before anybody could know."""
    starts: list[int] = []
    plain = failing_rows(house, lambda name: name == "r1")
    is_last = False

    def run(step: Step) -> StepResult:
        starts.extend(row.start for row in step.rows)
        # the chunks of the prompt go well, and the last one does not
        return plain(step) if is_last or step.rows[0].draw is not None else house.model.run(step)

    house.run = run
    client = client_of(house)
    long = tuple(range(1, 9)) * 6  # more than a step's tokens, so that there is a chunk before the last
    assert end(await collect(client, replace(request(1, A), prompt=long))).reason is FinishReason.FAILED
    assert starts == [0, 32]
    assert house.scheduler._blocks.num_labelled == 0
    assert end(await collect(client, replace(request(2, A), prompt=long))).num_cached_tokens == 0
    assert end(await collect(client, replace(request(3, A), prompt=long))).num_cached_tokens > 0
    house.scheduler.check()


async def test_steps_that_go_on_failing_are_the_end_of_the_engine(house: House) -> None:
    ran: list[int] = []

    def run(step: Step) -> StepResult:
        ran.append(step.id)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    house.run = run
    client = client_of(house)
    for i in range(MOST_FAILED):
        assert isinstance(end(await collect(client, request(i))).error, Internal)
    while house.engine.snapshot().state is EngineState.RUNNING:
        await asyncio.sleep(0.01)
    assert house.engine.snapshot().state is EngineState.DEAD
    assert len(ran) == MOST_FAILED
    with pytest.raises(Unavailable, match="restarted"):
        client.submit(request(99))


async def test_a_step_that_goes_well_in_between_forgives_the_others(house: House) -> None:
    plain = house.run

    def run(step: Step) -> StepResult:
        if int(step.rows[0].request[1:]) % 3:
            raise RuntimeError("now and then")
        return plain(step)

    house.run = run
    client = client_of(house)
    for i in range(1, 3 * MOST_FAILED):
        wanted = FinishReason.FAILED if i % 3 else FinishReason.LENGTH
        assert end(await collect(client, request(i, max_new_tokens=1))).reason is wanted
    assert house.engine.snapshot().state is EngineState.RUNNING
    house.scheduler.check()


async def test_an_engine_that_gives_up_ends_what_runs(house: House) -> None:
    client = client_of(house)
    plain, told = house.run, threading.Event()
    house.run = lambda step: (step.id > 2 and told.wait(10), plain(step))[1]
    stream = client.submit(request(1, max_new_tokens=50))
    await anext(stream)
    house.engine.give_up("the base's weights have changed")
    told.set()
    events = [event async for event in stream]
    assert isinstance(end(events).error, Unavailable)
    with pytest.raises(Unavailable):
        client.submit(request(2))
    assert await asyncio.to_thread(house.engine.drain, 10)
    assert house.engine.snapshot().state is EngineState.DEAD


@pytest.mark.parametrize("is_survived", [True, False])
async def test_short_memory_sends_adapters_away_that_nobody_uses(house: House, *, is_survived: bool) -> None:
    client = client_of(house)
    for i, adapter in enumerate((A, B, C)):
        await collect(client, request(i, adapter))
    house.engine.set_pinned(B, pinned=True)
    plain, left = house.run, [1]

    def run(step: Step) -> StepResult:
        if not left:
            return plain(step)
        left.pop()
        if not is_survived:
            raise MemoryError
        return replace(plain(step), was_short_of_memory=True)

    house.run = run
    events = await collect(client, request(10, A))
    if is_survived:
        assert end(events).reason is FinishReason.LENGTH
        assert {r.adapter for r in house.scheduler.snapshot().resident} == {A, B}
    else:
        assert isinstance(end(events).error, Unavailable)
        assert {r.adapter for r in house.scheduler.snapshot().resident} == {B}
    assert end(await collect(client, request(11, C))).reason is FinishReason.LENGTH
    house.scheduler.check()


ERRORS = [
    ValueError("x"),
    KeyError("x"),
    AssertionError("our own books"),
    RuntimeError("svd"),
    RecursionError(),
    EOFError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_whatever_a_load_raises_fails_its_own_requests(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def load(adapter: AdapterId) -> Adapter:
        if adapter == B:
            raise error
        return compiled(adapter)

    house = House(load)
    try:
        client = client_of(house)
        asked = [request(i, (A, B, C)[i % 3]) for i in range(6)]
        for one, events in zip(asked, await asyncio.gather(*(collect(client, one) for one in asked)), strict=True):
            if one.adapter == B:
                failure = end(events).error
                assert isinstance(failure, AdapterUnavailable)
                assert "does not load" in failure.message
            else:
                assert end(events).reason is FinishReason.LENGTH
        house.engine.load(B)
        await collect(client, request(6, C))
        house.scheduler.check()
    finally:
        house.engine.stop()
    logged = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(logged) == 1, "a load that fails is told once, however many asked for it"
    assert f"adapter {B} cannot be loaded: {type(error).__name__}" in logged[0]


async def test_a_load_that_finds_no_memory_is_tried_again_without_what_nobody_uses() -> None:
    def load(adapter: AdapterId) -> Adapter:
        asked.append(adapter)
        if adapter == B and A in house.engine.snapshot().host_adapters:
            raise MemoryError
        if adapter == C:
            raise MemoryError
        return compiled(adapter)

    asked: list[AdapterId] = []
    house = House(load)
    try:
        client = client_of(house)
        house.engine.load(A)
        while A not in house.engine.snapshot().host_adapters:
            await asyncio.sleep(0.01)
        await collect(client, request(1, A))
        # the snapshot that the fake looks at is that of the last step: one more step tells that A is gone
        failure = end(await collect(client, request(2, C))).error
        assert isinstance(failure, AdapterUnavailable)
        assert failure.retry_after_s
        assert "memory ran out" in failure.message
        assert asked.count(C) == 2
        await collect(client, request(3))
        assert end(await collect(client, request(4, B))).reason is FinishReason.LENGTH
        house.scheduler.check()
    finally:
        house.engine.stop()


def test_room_is_made_by_those_without_a_lease() -> None:
    tries: list[AdapterId] = []

    def load(adapter: AdapterId) -> Adapter:
        tries.append(adapter)
        if adapter == C and tries.count(C) == 1:
            raise MemoryError
        return compiled(adapter)

    outcomes: list[Adapter | Exception] = []
    cache = HostCache(load, max_bytes=1 << 20, clock=lambda: 0.0)
    for number, adapter in enumerate((A, B, C), start=1):
        cache.request(adapter, lambda _adapter, outcome: outcomes.append(outcome))
        while len(outcomes) < number:
            time.sleep(0.001)
        if adapter == A:
            cache.release(A)
    cache.check()
    assert [outcome.id for outcome in outcomes if isinstance(outcome, Adapter)] == [A, B, C]
    assert cache.resident() == (B, C), "B is leased, and A was in the way"
    cache.close()
