"""`/v1/events`: one look at the server for everybody who watches, and nothing of anybody's texts in it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import replace
from typing import Any

import httpx
import pytest

from peft_serve.api.beat import MAX_LISTENERS, Beat
from peft_serve.api.principal import ANYONE
from peft_serve.api.rates import Counts, RateWindow
from peft_serve.api.service import Service
from peft_serve.core import AdapterId, Draw, Row, SamplingParams, Step
from peft_serve.engine.snapshot import EngineSnapshot, EngineState
from peft_serve.engine.tally import StepTally, is_prefill
from peft_serve.errors import QueueFull
from peft_serve.scheduling.slots import Resident
from tests.api.api_fakes import World

LONG = {"max_new_tokens": 60, "ignore_eos": True}
DRAW = Draw(params=SamplingParams(), seed=1, index=0)


def row(slot: int, *, start: int = 0, num: int = 4, prompt: int = 4, **more: Any) -> Row:
    return Row(
        request=f"r{slot}{start}",  # type: ignore[arg-type]
        slot=slot,
        tokens=tuple(range(9000, 9000 + num)),
        start=start,
        blocks=(1,),
        prompt=(0, prompt),
        **more,
    )


class Shown:
    """An engine's snapshots, as a test wants them."""

    def __init__(self, world: World) -> None:
        self._below = world.engine.snapshot
        self.facts: dict[str, Any] = {}
        self.num_looks = 0

    def __call__(self) -> EngineSnapshot:
        self.num_looks += 1
        return replace(self._below(), **self.facts)


@pytest.fixture
def shown(world: World, monkeypatch: pytest.MonkeyPatch) -> Shown:
    made = Shown(world)
    monkeypatch.setattr(world.engine, "snapshot", made)
    return made


@pytest.fixture
def beat(world: World) -> Beat:
    return Beat(Service(world.parts, now=time.time, draw_bits=lambda _: 7))


async def taken(beat: Beat, count: int) -> list[dict[str, Any]]:
    """The next events of one listener."""
    events = beat.join(ANYONE)
    found: list[dict[str, Any]] = []
    try:
        async for chunk in events:
            found.append(json.loads(chunk.removeprefix(b"data: ")))
            if len(found) == count:
                return found
        return found
    finally:
        beat.leave()


def resident(adapter: AdapterId, slot: int, **more: Any) -> Resident:
    return Resident(adapter=adapter, slot=slot, **({"num_bytes": 10, "num_leases": 1, "is_pinned": False} | more))


async def test_an_event_tells_the_queue_the_rows_and_the_slots(world: World, shown: Shown, beat: Beat) -> None:
    plain, soft = world.adapters["plain"], world.adapters["soft"]
    both = AdapterId(f"{plain}*0.7+{soft}")
    for adapter, name in ((plain, "plain"), (soft, "soft"), (both, "plain:0.7+soft")):
        beat._service.learn(adapter, name)
    shown.facts = {
        "resident": (resident(soft, 2, is_pinned=True), resident(plain, 1, num_leases=3), resident(both, 4)),
        "waiting_adapters": (plain,),
        "num_waiters": (2,),
        "num_waiting": 2,
        "num_loading": 1,
        "host_adapters": (plain, soft),
        "device_bytes": 20,
        "host_bytes": 30,
        "kv_usage": 0.25,
        "num_steps": 1,
    }
    asyncio.get_running_loop().call_later(
        0.2,
        lambda: shown.facts.update(
            num_steps=2,
            last_rows=(row(0), row(1, start=9, num=1, draw=DRAW), row(2, draw=DRAW), row(4), row(7)),
        ),
    )
    first, second = await taken(beat, 2)
    assert first["rows"] == [], "no step was made while somebody watched"
    assert second["rows"] == [
        {"adapter": "base", "method": "base", "phase": "prefill", "tokens": 4},
        {"adapter": "plain", "method": "LORA", "phase": "decode", "tokens": 10},
        {"adapter": "soft", "method": "PROMPT_TUNING", "phase": "prefill", "tokens": 4},
        {"adapter": "plain:0.7+soft", "method": "LORA+PROMPT_TUNING", "phase": "prefill", "tokens": 4},
    ], "a row whose adapter has left its slot is not told"
    assert second["queue"] == {"waiting": 2, "loading": 1, "adapters": [{"name": "plain", "waiting": 2}]}
    assert second["slots"][:2] == [
        {"slot": 1, "adapter": "plain", "bytes": 10, "in_flight": 3, "pinned": False},
        {"slot": 2, "adapter": "soft", "bytes": 10, "in_flight": 1, "pinned": True},
    ]
    assert second["tiers"] == {"device": {"adapters": 3, "bytes": 20}, "host": {"adapters": 2, "bytes": 30}}
    assert (second["state"], second["num_slots"], second["kv_usage"]) == ("running", 8, 0.25)
    assert second["time"] > first["time"]
    assert "900" not in json.dumps(second), "no token of a request is told"


async def test_the_fullest_step_between_two_events_is_told(shown: Shown, beat: Beat) -> None:
    loop = asyncio.get_running_loop()
    shown.facts = {"num_steps": 5}
    for delay, num_steps, rows in ((0.15, 6, (row(0), row(0, start=1))), (0.35, 7, (row(0, start=2),))):
        loop.call_later(delay, lambda n=num_steps, r=rows: shown.facts.update(num_steps=n, last_rows=r))
    events = await taken(beat, 3)
    assert [len(each["rows"]) for each in events] == [0, 2, 0]


async def test_everybody_who_watches_shares_one_look(shown: Shown, beat: Beat) -> None:
    began = time.monotonic()
    found = await asyncio.gather(*(taken(beat, 3) for _ in range(20)))
    assert time.monotonic() - began < 3
    assert all(each == found[0] for each in found)
    assert shown.num_looks < 40, "twenty listeners cost what one does"
    seen = shown.num_looks
    await asyncio.sleep(0.3)
    assert shown.num_looks == seen, "nobody looks while nobody watches"
    assert len(await taken(beat, 1)) == 1, "and it begins again"


async def test_rates_are_those_of_the_last_seconds(world: World, shown: Shown, beat: Beat) -> None:
    shown.facts = {"num_drawn_tokens": 1000, "num_prompt_tokens": 500}
    world.parts.metrics.observe_step(seconds=9.0, num_rows=1, num_tokens=1, num_adapters=0)

    def work() -> None:
        shown.facts = {"num_drawn_tokens": 1100, "num_prompt_tokens": 550}
        world.parts.metrics.observe_step(seconds=0.02, num_rows=1, num_tokens=1, num_adapters=0)

    asyncio.get_running_loop().call_later(0.3, work)
    first, second = await taken(beat, 2)
    assert (first["tokens_per_s"], first["step_ms"], first["prefix_cache_hit_share"]) == (0.0, None, None)
    assert second["tokens_per_s"] == pytest.approx(2 * second["prompt_tokens_per_s"], abs=0.2)
    assert 100 < second["tokens_per_s"] < 250
    assert second["step_ms"] == pytest.approx(20.0)


def test_a_window_forgets() -> None:
    window = RateWindow()
    for i in range(300):
        rates = window.add(
            Counts(time_s=i / 2, drawn_tokens=5 * i, steps=i, step_s=i * 0.01, looked_up=100 * i, cached=30 * i)
        )
    assert (rates.tokens_per_s, rates.step_ms, rates.cached_share) == (10.0, pytest.approx(10.0), pytest.approx(0.3))
    rates = window.add(Counts(time_s=400.0, drawn_tokens=1495, steps=299, step_s=2.99, looked_up=29900, cached=8970))
    assert (rates.tokens_per_s, rates.step_ms, rates.cached_share) == (0.0, None, None)


def test_a_tally_tells_prompts_from_answers() -> None:
    tally = StepTally()
    rows = (row(0, draw=DRAW), row(0, start=4, num=1, draw=DRAW), row(1, num=2, prompt=8), row(2, start=4, branch=1))
    tally.note(Step(id=1, rows=rows))
    assert [is_prefill(each) for each in rows] == [True, False, True, False]
    assert (tally.num_prompt_tokens, tally.num_drawn_tokens, tally.rows) == (6, 2, rows)
    tally.note(Step(id=2, rows=(row(0, num=0, prompt=0, source=(1, 2, 3)),)))
    assert (tally.num_prompt_tokens, tally.num_drawn_tokens) == (9, 2)


async def test_too_many_listeners_are_refused(beat: Beat) -> None:
    for _ in range(MAX_LISTENERS):
        beat.join(ANYONE)
    with pytest.raises(QueueFull, match="watch already"):
        beat.join(ANYONE)
    for _ in range(MAX_LISTENERS):
        beat.leave()
    assert len(await taken(beat, 1)) == 1


@pytest.mark.parametrize(
    ("state", "ends"), [(EngineState.DRAINING, True), (EngineState.DEAD, True), (EngineState.RUNNING, False)]
)
async def test_the_stream_ends_with_the_server(shown: Shown, beat: Beat, state: EngineState, ends: bool) -> None:
    shown.facts = {"state": state}
    events = await taken(beat, 3)
    assert [each["state"] for each in events] == [state.value] * (1 if ends else 3)


async def test_a_draining_server_is_watched_to_its_last_request(shown: Shown, beat: Beat) -> None:
    shown.facts = {"state": EngineState.DRAINING, "num_running": 1}
    asyncio.get_running_loop().call_later(0.8, lambda: shown.facts.update(num_running=0))
    assert [each["state"] for each in await taken(beat, 9)] == ["draining"] * 3


def test_over_a_socket(url: str, world: World) -> None:
    world.engine.step_s = 0.02
    run = threading.Thread(
        target=httpx.post, args=(f"{url}/generate?adapter=plain",), kwargs={"json": {"inputs": "x", "parameters": LONG}}
    )
    run.start()
    with httpx.stream("GET", f"{url}/v1/events", timeout=5) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        lines = (line for line in response.iter_lines() if line)
        events = [json.loads(next(lines).removeprefix("data: ")) for _ in range(2)]
    assert events[0]["state"] == "running"
    assert {"queue", "rows", "slots", "num_slots", "tiers", "kv_usage", "tokens_per_s", "step_ms"} <= events[1].keys()
    run.join()
