"""A replica over a fake engine: what it answers and translates, and when it has to be replaced."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from peft_serve.adapters.filesystem import DiskFileSystem
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.store import AdapterStore
from peft_serve.api.operations import MAX_STALL_S
from peft_serve.cluster.front_parts import homes_of, opened
from peft_serve.cluster.remote_gate import RemoteGate
from peft_serve.cluster.replica import Replica, Unhealthy
from peft_serve.cluster.replicas import ReplicaLost
from peft_serve.cluster.routes import key_of
from peft_serve.cluster.wire import Accepted, Ask, Found, Told, unpacked
from peft_serve.config import Settings
from peft_serve.core import BASE, AdapterId, Event, FinishEvent, FinishReason, RequestId, SamplingParams, TokenEvent
from peft_serve.engine.snapshot import EngineState
from peft_serve.errors import AdapterInvalid, QueueFull, Unavailable
from tests.api.api_fakes import FakeEngine, World, checkpoint, checkpoint_files, make_world
from tests.cluster.cluster_fakes import ScriptedReplicas, carried, request


class EndingEngine(FakeEngine):
    """With what only a replica asks of its engine."""

    def give_up(self, reason: str) -> None:
        self.state = EngineState.DEAD

    def cut_short(self) -> None:
        self.state = EngineState.DRAINING

    def stop(self) -> None:
        if self._thread.is_alive():
            super().stop()


@pytest.fixture
async def world(tiny_tokenizer: Any, tmp_path: Path) -> AsyncIterator[World]:
    folder = tmp_path / "folders" / "mine"
    folder.mkdir(parents=True)
    for name, content in checkpoint("mine").items():
        (folder / name).write_bytes(content)
    world = make_world(tiny_tokenizer, tmp_path, folders=[tmp_path / "folders"])
    world.engine.__class__ = EndingEngine
    yield world
    world.engine.stop()


def made(world: World) -> Replica:
    engine = world.engine
    assert isinstance(engine, EndingEngine)
    return Replica(world.parts, engine, name="one", max_ongoing=4)


def ask(name: str = "r", *, sent_s: float | None = None, homes: Any = None, **changes: Any) -> Ask:
    now = time.monotonic()
    sampling = SamplingParams(max_new_tokens=5, ignore_eos=True)
    asked = request(name, **{"sampling": sampling, "arrival_s": now, **changes})
    return carried(Ask(front="front", sent_s=now if sent_s is None else sent_s, request=asked, homes=homes or {}))


async def answered(replica: Replica, asked: Ask) -> list[Sequence[Event]]:
    items = [carried(item) async for item in replica.generate(asked)]
    assert items[0] == Accepted(replica="one")
    return [unpacked(item) for item in items[1:]]


async def test_each_step_is_one_item_and_the_last_has_the_end(world: World) -> None:
    replica = made(world)
    world.engine.start()
    steps = await answered(replica, ask())
    events = [event for step in steps for event in step]
    assert [type(event) for event in events] == [TokenEvent] * 5 + [FinishEvent]
    assert isinstance(steps[-1][-1], FinishEvent)
    assert replica.report("front", 0.0).num_open == 0


async def test_requests_side_by_side_are_kept_apart(world: World) -> None:
    replica = made(world)
    world.engine.start()
    found = await asyncio.gather(*(answered(replica, ask(f"r{i}")) for i in range(8)))
    for i, steps in enumerate(found):
        assert {event.request for step in steps for event in step} == {f"r{i}"}
        assert sum(len(step) for step in steps) == 6


async def test_a_call_that_is_closed_cancels_its_request(world: World) -> None:
    replica = made(world)
    world.engine.held = True
    world.engine.start()
    async with aclosing(replica.generate(ask())) as items:
        assert await anext(items) == Accepted(replica="one")
        waiting = asyncio.ensure_future(anext(items))
        await asyncio.sleep(0.01)
        assert replica.report("front", 0.0).num_open == 1
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert world.engine.cancelled == [("r", FinishReason.CANCELLED)]
    assert world.engine.num_live == replica.report("front", 0.0).num_open == 0


async def test_a_request_that_is_stopped_tells_its_end(world: World) -> None:
    replica = made(world)
    world.engine.held = True
    world.engine.start()
    answer = asyncio.ensure_future(answered(replica, ask()))
    await asyncio.sleep(0.01)
    replica.stop(RequestId("r"), FinishReason.STOP)
    (step,) = await answer
    assert isinstance(step[0], FinishEvent)
    assert step[0].reason is FinishReason.STOP


async def test_what_the_engine_refuses_is_told_as_the_end(world: World) -> None:
    replica = made(world)
    world.engine.max_queue = 0
    ((event,),) = await answered(replica, ask())
    assert isinstance(event, FinishEvent)
    assert isinstance(event.error, QueueFull)
    assert event.error.retry_after_s == 3.0
    world.engine.state = EngineState.DEAD
    ((event,),) = await answered(replica, ask())
    assert isinstance(event, FinishEvent)
    assert isinstance(event.error, Unavailable)


async def test_times_are_those_of_the_clock_here(world: World) -> None:
    replica = made(world)
    world.engine.start()
    ahead, now = 5000.0, time.monotonic()
    asked = ask(sent_s=now + ahead, arrival_s=now + ahead - 2, deadline_s=now + ahead + 3)
    await answered(replica, asked)
    (seen,) = world.engine.seen
    assert seen.deadline_s is not None
    assert seen.deadline_s - seen.arrival_s == pytest.approx(5.0)
    assert seen.arrival_s == pytest.approx(now - 2, abs=0.5)
    replica.report("front", now + ahead)
    late = ask("late", sent_s=now + ahead - 60, arrival_s=now + ahead - 60, deadline_s=now + ahead - 50)
    await answered(replica, late)
    assert world.engine.seen[1].deadline_s == pytest.approx(now - 50, abs=0.5), "it waited for a minute on its way"


async def test_an_adapter_of_a_folder_is_found_by_the_name_that_the_front_knows(
    world: World, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    one = checkpoint_files(checkpoint("mine")).digest()
    combined = AdapterId(f"{one}+{one}*0.5")
    catalog = world.catalog
    assert homes_of(catalog, one) == {}
    assert catalog.resolve("mine").id == one
    assert homes_of(catalog, combined) == {one: "mine"}
    assert homes_of(catalog, BASE) == {}
    cold = make_world(tiny_tokenizer, tmp_path / "cold", folders=[tmp_path / "folders"])
    with pytest.raises(Unavailable):
        cold.catalog.files(one)
    cold.engine.__class__ = EndingEngine
    cold.engine.start()
    await answered(made(cold), ask(adapter=one, homes={one: "mine", AdapterId("sha256:0"): "nowhere"}))
    assert cold.catalog.files(one).digest() == one
    cold.engine.stop()


async def test_a_replica_tells_how_it_is(world: World) -> None:
    replica = made(world)
    one, two = AdapterId("sha256:one"), AdapterId("sha256:two")
    world.engine.resident = {one: False, two: True}
    told = replica.routing_stats()
    assert told["resident"] == [key_of(one), key_of(two)]
    assert (told["num_ongoing"], told["max_ongoing"]) == (0, 4)
    assert told["max_running"] == world.parts.settings.max_rows, "requests beyond these wait"
    replica.check_health()
    world.engine.stalled_s = MAX_STALL_S + 1
    assert replica.routing_stats()["max_ongoing"] == 0, "nobody is sent there any more"
    with pytest.raises(Unhealthy, match="61 s"):
        replica.check_health()
    world.engine.stalled_s, world.engine.state = 0.0, EngineState.DEAD
    assert replica.routing_stats()["max_ongoing"] == 0
    with pytest.raises(Unhealthy, match="dead"):
        replica.check_health()


async def test_the_gate_is_a_replicas_by_wire(world: World) -> None:
    replica = made(world)

    class Asked(ScriptedReplicas):
        lost = 1

        async def inspect(self, files: CheckpointFiles) -> Found | Told:
            if self.lost:
                self.lost -= 1
                raise ReplicaLost("killed")
            found: Found | Told = carried(await replica.inspect(carried(files)))
            return found

    asked = Asked()
    gate = RemoteGate(asked, asyncio.get_running_loop())
    good = checkpoint_files(checkpoint("good", cues=[3, 4], head=["SEQ_CLS", 2]))
    found = await asyncio.to_thread(gate.draft, good)
    assert (found.id, found.cues, found.summary.rank) == (good.digest(), (3, 4), 8)
    bad = checkpoint_files(checkpoint("bad", bad="is too wide"))
    with pytest.raises(AdapterInvalid) as refused:
        await asyncio.to_thread(gate.check, bad)
    assert [each.reason for each in refused.value.errors] == ["is too wide", "has a twin"]
    asked.lost = 2
    with pytest.raises(Unavailable, match="no replica"):
        await asyncio.to_thread(gate.check, good)


def test_a_reader_sees_what_the_writer_keeps_and_changes_nothing(tiny_tokenizer: Any, tmp_path: Path) -> None:
    reader = AdapterStore(tmp_path / "store", DiskFileSystem(), writes=False)  # before there is a store
    world = make_world(tiny_tokenizer, tmp_path)
    one = world.publish("one", checkpoint("one"))
    assert reader.is_read_only
    assert reader.read_blob(one).digest() == one
    with pytest.raises(Unavailable, match="read-only"):
        reader.require_writable()
    reader.close()
    with pytest.raises(Unavailable, match="in use"):
        AdapterStore(tmp_path / "store", DiskFileSystem())


def test_a_front_waits_for_the_store_of_the_one_before_it(tmp_path: Path) -> None:
    naps: list[float] = []
    tries = [Unavailable("in use"), Unavailable("in use"), None]

    def opens(settings: Settings, root: Path) -> Any:
        error = tries.pop(0)
        if error is not None:
            raise error
        return "store"

    assert opened(Settings(), tmp_path, opens=opens, clock=lambda: sum(naps), sleep=naps.append) == "store"
    tries = [Unavailable("in use")] * 1000
    with pytest.raises(Unavailable):
        opened(Settings(), tmp_path, opens=opens, clock=lambda: sum(naps), sleep=naps.append)
    assert sum(naps) < 63
