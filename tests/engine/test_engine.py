"""The engine's thread: events reach asyncio, faults stay with those they belong to, nothing is left behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from peft_serve.adapters.host_cache import HostCache
from peft_serve.adapters.primitives import Adapter, Affine, KVPrefix
from peft_serve.core import (
    BASE,
    AdapterId,
    Event,
    FinishEvent,
    FinishReason,
    Footprint,
    Request,
    RequestId,
    SamplingParams,
    Step,
    StepResult,
    TokenEvent,
)
from peft_serve.engine.client import EngineClient, EventStream
from peft_serve.engine.loop import Engine
from peft_serve.engine.snapshot import EngineState
from peft_serve.errors import AdapterUnavailable, Internal, QueueFull, ServeError, Unavailable
from peft_serve.metrics import Metrics
from peft_serve.scheduling.blocks import BlockLedger
from peft_serve.scheduling.limits import Limits
from peft_serve.scheduling.scheduler import Scheduler
from peft_serve.scheduling.slots import SlotLedger
from tests.scheduling.fake_model import FakeModel, alone

LIMITS = Limits(
    max_rows=8,
    max_step_tokens=32,
    max_step_adapters=4,
    max_step_rank=64,
    max_queue=64,
    block_size=4,
    max_context=64,
)
NUM_BLOCKS = 65
PREFIXED = AdapterId("sha256:prefixed")
FOOTPRINT = Footprint(num_bytes=0)


def compiled(adapter: AdapterId) -> Adapter:
    if adapter != PREFIXED:
        return Adapter(id=adapter, method="LORA", sites={"some.site": Affine(shift=torch.zeros(1))})
    kv = torch.zeros(1, 1, 6, 2)
    return Adapter(id=adapter, method="PREFIX_TUNING", prefix=KVPrefix(keys_LHPD=kv, values_LHPD=kv))


class House:
    """An engine over the fake model, with an event loop's client."""

    def __init__(
        self,
        load: Callable[[AdapterId], Adapter] = compiled,
        *,
        limits: Limits = LIMITS,
        host_bytes: int = 1 << 20,
        **changes: Any,
    ) -> None:
        names = [AdapterId(f"sha256:{i}") for i in range(40)]
        footprints = {a: compiled(a).footprint(is_encoder_decoder=False) for a in (*names, PREFIXED)}
        self.model = FakeModel(num_slots=4, block_size=4, footprints={BASE: FOOTPRINT, **footprints})
        self.run: Callable[[Step], StepResult] = self.model.run
        self.scheduler = Scheduler(
            limits,
            SlotLedger(num_slots=4, max_bytes=1 << 20),
            BlockLedger(num_blocks=NUM_BLOCKS, block_size=4),
            None,
            time.monotonic,
        )
        self.engine = Engine(
            scheduler=self.scheduler,
            host_cache=HostCache(load, max_bytes=host_bytes, clock=time.monotonic),
            metrics=Metrics(),
            clock=time.monotonic,
            draw_seed=lambda: 7,
            footprint_of=lambda adapter: adapter.footprint(is_encoder_decoder=False),
            block_size=4,
            **{"max_queue": 64, "make_runner": lambda adapters: _Runner(self, adapters), **changes},
        )


class _Runner:
    """Runs steps on the house's model and insists that an install finds its host copy."""

    def __init__(self, house: House, adapters: Callable[[AdapterId], Adapter]) -> None:
        self._house = house
        self._adapters = adapters

    def run(self, step: Step) -> StepResult:
        for install in step.installs:
            assert self._adapters(install.adapter).id == install.adapter
        return self._house.run(step)


@pytest.fixture
def house() -> Iterator[House]:
    made = House()
    yield made
    made.engine.stop()


def request(i: int, adapter: AdapterId = BASE, **params: Any) -> Request:
    return Request(
        id=RequestId(f"r{i}"),
        adapter=adapter,
        prompt=tuple(range(1, 4 + i % 5)),
        sampling=SamplingParams(**{"max_new_tokens": 6, **params}),
        arrival_s=time.monotonic(),
    )


async def collect(client: EngineClient, wanted: Request) -> list[Event]:
    return [event async for event in client.submit(wanted)]


async def test_everyone_gets_what_they_would_get_alone(house: House) -> None:
    client = EngineClient(house.engine, asyncio.get_running_loop())
    house.engine.start()
    asked = [request(i, AdapterId(f"sha256:{i % 7}") if i % 3 else BASE, seed=i) for i in range(30)]
    asked += [request(100 + i, PREFIXED, seed=i) for i in range(3)]
    answers = await asyncio.gather(*(collect(client, one) for one in asked))
    for one, events in zip(asked, answers, strict=True):
        footprint = compiled(one.adapter).footprint(is_encoder_decoder=False)
        want = alone(one, footprint, LIMITS, capacity=NUM_BLOCKS - 1, cross_capacity=0)
        assert tuple(e.token for e in events if isinstance(e, TokenEvent)) == want.tokens
        assert isinstance(events[-1], FinishEvent)
        assert events[-1].reason is want.reason
    assert client.num_open == 0
    house.scheduler.check()
    assert house.engine.snapshot().num_running == 0


async def test_a_closed_stream_gives_everything_back(house: House) -> None:
    client = EngineClient(house.engine, asyncio.get_running_loop())
    house.engine.start()
    stream = client.submit(request(1, max_new_tokens=50))
    assert isinstance(await anext(stream), TokenEvent)
    stream.close()
    stream.close()
    assert client.num_open == 0
    assert await asyncio.to_thread(house.engine.drain, 10)
    assert house.scheduler.snapshot().num_running == 0
    house.scheduler.check()


async def test_a_stop_ends_with_its_own_reason(house: House) -> None:
    client = EngineClient(house.engine, asyncio.get_running_loop())
    release = threading.Event()
    plain = house.run
    house.run = lambda step: (release.wait(10), plain(step))[1]
    house.engine.start()
    stream = client.submit(request(1, max_new_tokens=50))
    client.stop(RequestId("r1"), FinishReason.STOP)
    release.set()
    events = [event async for event in stream]
    assert isinstance(events[-1], FinishEvent)
    assert events[-1].reason is FinishReason.STOP


async def test_an_adapter_that_does_not_load_fails_its_own_requests_only() -> None:
    def load(adapter: AdapterId) -> Adapter:
        if adapter == "sha256:1":
            raise OSError("/secret/path is gone")
        return compiled(adapter)

    house = House(load)
    try:
        client = EngineClient(house.engine, asyncio.get_running_loop())
        house.engine.start()
        asked = [request(i, AdapterId(f"sha256:{i % 3}")) for i in range(9)]
        answers = await asyncio.gather(*(collect(client, one) for one in asked))
        for one, events in zip(asked, answers, strict=True):
            last = events[-1]
            assert isinstance(last, FinishEvent)
            if one.adapter == "sha256:1":
                assert isinstance(last.error, AdapterUnavailable)
                assert "/secret" not in last.error.message
            else:
                assert last.reason is FinishReason.LENGTH
    finally:
        house.engine.stop()


async def test_a_step_that_raises_fails_its_rows_and_the_engine_goes_on(house: House) -> None:
    client = EngineClient(house.engine, asyncio.get_running_loop())
    plain, broken = house.run, [True]

    def run(step: Step) -> StepResult:
        if broken.pop() if broken else False:
            raise RuntimeError("out of memory")
        return plain(step)

    house.run = run
    house.engine.start()
    last = (await collect(client, request(1, AdapterId("sha256:1"))))[-1]
    assert isinstance(last, FinishEvent)
    assert isinstance(last.error, Internal)
    last = (await collect(client, request(2, AdapterId("sha256:1"))))[-1]
    assert isinstance(last, FinishEvent)
    assert last.reason is FinishReason.LENGTH
    house.scheduler.check()


async def test_a_full_queue_refuses_at_once() -> None:
    house = House(max_queue=3)
    release = threading.Event()
    plain = house.run
    house.run = lambda step: (release.wait(10), plain(step))[1]
    try:
        client = EngineClient(house.engine, asyncio.get_running_loop())
        house.engine.start()
        streams: list[EventStream] = []
        with pytest.raises(QueueFull, match="--max-queue") as refused:
            streams.extend(client.submit(request(i)) for i in range(40))
        assert refused.value.retry_after_s
        assert len(streams) >= 3
        release.set()
        for stream in streams:
            assert isinstance([event async for event in stream][-1], FinishEvent)
    finally:
        house.engine.stop()


async def test_the_full_queue_holds_as_many_as_it_is_said_to() -> None:
    house = House(max_queue=3)
    stepping, release = threading.Event(), threading.Event()
    plain = house.run
    house.run = lambda step: (stepping.set(), release.wait(10), plain(step))[2]
    try:
        client = EngineClient(house.engine, asyncio.get_running_loop())
        house.engine.start()
        streams = [client.submit(request(0))]
        assert await asyncio.to_thread(stepping.wait, 10)  # from here on nobody leaves the queue
        streams += [client.submit(request(i)) for i in range(1, 4)]
        with pytest.raises(QueueFull, match=r"^3 requests are waiting"):
            client.submit(request(4))
        release.set()
        for stream in streams:
            assert isinstance([event async for event in stream][-1], FinishEvent)
    finally:
        release.set()
        house.engine.stop()


async def test_before_start_and_while_draining_nothing_is_admitted(house: House) -> None:
    client = EngineClient(house.engine, asyncio.get_running_loop())
    with pytest.raises(Unavailable):
        client.submit(request(1))
    house.engine.start()
    running = asyncio.ensure_future(collect(client, request(2)))
    await asyncio.sleep(0)
    assert await asyncio.to_thread(house.engine.drain, 10)
    with pytest.raises(Unavailable):
        client.submit(request(3))
    assert (await running)[-1].reason is FinishReason.LENGTH  # type: ignore[union-attr]


async def test_a_dead_engine_ends_every_request_and_says_so(house: House) -> None:
    client = EngineClient(house.engine, asyncio.get_running_loop())

    def commit(result: StepResult) -> list[Event]:
        raise AssertionError("the books are wrong")

    house.scheduler.commit = commit  # type: ignore[method-assign]
    house.engine.start()
    events = await asyncio.wait_for(collect(client, request(1)), 10)
    assert isinstance(events[-1], FinishEvent)
    assert isinstance(events[-1].error, ServeError)
    assert house.engine.snapshot().state is EngineState.DEAD
    with pytest.raises(Unavailable):
        client.submit(request(2))


async def test_forty_adapters_pass_through_four_slots(house: House) -> None:
    client = EngineClient(house.engine, asyncio.get_running_loop())
    house.engine.start()
    asked = [request(i, AdapterId(f"sha256:{(i * 17) % 40}"), max_new_tokens=2) for i in range(60)]
    answers = await asyncio.gather(*(collect(client, one) for one in asked))
    assert all(events[-1].reason is FinishReason.LENGTH for events in answers)  # type: ignore[union-attr]
    snapshot = house.engine.snapshot()
    assert len(snapshot.resident) <= 4


async def test_an_adapter_that_the_host_has_is_in_the_next_step_beside_those_that_run(house: House) -> None:
    """Nobody who has to wait for a step waits for two because its adapter has no slot yet."""
    wanted = AdapterId("sha256:5")
    may_run, running = threading.Semaphore(0), threading.Semaphore(0)
    steps: list[Step] = []
    plain = house.run

    def run(step: Step) -> StepResult:
        steps.append(step)
        running.release()
        assert may_run.acquire(timeout=10)
        return plain(step)

    client = EngineClient(house.engine, asyncio.get_running_loop())
    house.engine.start()
    house.engine.load(wanted)
    while wanted not in house.engine.snapshot().host_adapters:
        await asyncio.sleep(0.01)
    house.run = run
    answers = [asyncio.ensure_future(collect(client, request(1, max_new_tokens=4)))]
    assert await asyncio.to_thread(running.acquire, timeout=10)  # the first step runs
    answers.append(asyncio.ensure_future(collect(client, request(2, wanted, max_new_tokens=1))))
    await asyncio.sleep(0)
    may_run.release(20)
    await asyncio.gather(*answers)
    assert [install.adapter for install in steps[1].installs] == [wanted]
    assert RequestId("r2") in [row.request for row in steps[1].rows]


async def test_a_load_begins_when_its_request_comes_and_not_when_the_step_is_over() -> None:
    loading, stepping, may_run = threading.Event(), threading.Event(), threading.Event()

    def load(adapter: AdapterId) -> Adapter:
        loading.set()
        return compiled(adapter)

    house = House(load)
    plain = house.run
    house.run = lambda step: (stepping.set(), may_run.wait(10), plain(step))[2]
    try:
        client = EngineClient(house.engine, asyncio.get_running_loop())
        house.engine.start()
        answers = [asyncio.ensure_future(collect(client, request(1)))]
        assert await asyncio.to_thread(stepping.wait, 10)
        answers.append(asyncio.ensure_future(collect(client, request(2, AdapterId("sha256:1")))))
        assert await asyncio.to_thread(loading.wait, 10)  # while the first step still runs
        may_run.set()
        ends = [events[-1] for events in await asyncio.gather(*answers)]
        assert [end.reason for end in ends if isinstance(end, FinishEvent)] == [FinishReason.LENGTH] * 2
        house.scheduler.check()
    finally:
        may_run.set()
        house.engine.stop()


async def test_unload_gives_back_both_tiers_and_pin_keeps(house: House) -> None:
    client = EngineClient(house.engine, asyncio.get_running_loop())
    house.engine.start()
    first, second = AdapterId("sha256:1"), AdapterId("sha256:2")
    await collect(client, request(1, first))
    await collect(client, request(2, second))
    house.engine.set_pinned(second, pinned=True)
    house.engine.unload(first)
    house.engine.load(AdapterId("sha256:3"))
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        snapshot = house.engine.snapshot()
        resident = {r.adapter: r.is_pinned for r in snapshot.resident}
        if first not in snapshot.host_adapters and "sha256:3" in snapshot.host_adapters and resident == {second: True}:
            break
        await asyncio.sleep(0.02)
    assert resident == {second: True}
    assert first not in snapshot.host_adapters
    assert "sha256:3" in snapshot.host_adapters


@pytest.mark.parametrize("reads_host_copies", [True, False])
async def test_what_a_slot_reads_on_the_host_stays_there_as_long_and_counts_once(reads_host_copies: bool) -> None:
    """Room for one adapter on the host, and four slots: what slots read is neither evicted nor loaded again."""
    house = House(limits=replace(LIMITS, reads_host_copies=reads_host_copies), host_bytes=4)
    client = EngineClient(house.engine, asyncio.get_running_loop())
    house.engine.start()
    try:
        for i in range(6):
            await collect(client, request(i, AdapterId(f"sha256:{i}")))
        await asyncio.sleep(0)
        house.engine.unload(AdapterId("sha256:5"))
        await collect(client, request(7))
        assert await asyncio.to_thread(house.engine.drain, 10)
        snapshot = house.engine.snapshot()
        in_slots = {resident.adapter for resident in snapshot.resident}
        assert in_slots == {"sha256:2", "sha256:3", "sha256:4"}
        if reads_host_copies:
            assert set(snapshot.host_adapters) == in_slots
            assert snapshot.host_bytes == snapshot.device_bytes == 3 * 4
        else:
            assert len(snapshot.host_adapters) <= 1
    finally:
        house.engine.stop()


async def test_pins_that_fill_the_device_fail_the_others_and_nobody_else(house: House) -> None:
    """An adapter that is loaded and finds no seat gives its host copy back, as often as it is asked for."""
    client = EngineClient(house.engine, asyncio.get_running_loop())
    house.engine.start()
    kept = [AdapterId(f"sha256:{i}") for i in range(4)]  # as many as there are slots
    for i, adapter in enumerate(kept):
        await collect(client, request(i, adapter))
        house.engine.set_pinned(adapter, pinned=True)
    for i in range(3):
        last = (await collect(client, request(50 + i, AdapterId("sha256:30"))))[-1]
        assert isinstance(last, FinishEvent)
        assert isinstance(last.error, AdapterUnavailable)
        assert last.error.retry_after_s is not None
    assert house.engine.snapshot().state is EngineState.RUNNING
    assert house.engine.snapshot().pinned == set(kept)
    events = await collect(client, request(90, kept[0]))
    assert isinstance(events[-1], FinishEvent)
    assert events[-1].reason is not FinishReason.FAILED
    house.scheduler.check()


async def test_an_adapter_that_is_asked_for_again_before_its_copy_is_given_back(house: House) -> None:
    client = EngineClient(house.engine, asyncio.get_running_loop())
    house.engine.start()
    for i in range(40):
        adapter = AdapterId(f"sha256:{i % 9}")
        first = client.submit(request(i, adapter))
        first.close()
        assert isinstance((await collect(client, request(1000 + i, adapter)))[-1], FinishEvent)
    assert house.engine.snapshot().state is EngineState.RUNNING
    house.scheduler.check()
