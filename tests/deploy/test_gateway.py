"""A gateway chooses this server by its metrics and its readiness alone: what an endpoint picker reads in each state."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from peft_serve.core import AdapterId
from peft_serve.engine.snapshot import EngineSnapshot
from peft_serve.gateway_figures import MAX_HOST_SERIES, GatewayFigures, GatewayState, LoadedAdapter
from tests.api.api_fakes import FakeEngine, World, make_world
from tests.api.conftest import http, populate
from tests.deploy.conftest import Load
from tests.deploy.picker import ENGINE_VLLM, Endpoint


def test_an_idle_server_has_room_for_everybody(load: Load) -> None:
    seen = Endpoint().read(load.before.text)
    assert seen.errors == []
    assert (seen.waiting, seen.running, seen.kv_usage) == (0, 0, 0.0)
    assert (seen.active_models, seen.waiting_models, seen.loaded) == (set(), set(), {})
    assert (seen.max_active_models, seen.num_gpu_loaded, seen.base_model) == (1, 0, "base")
    assert seen.block_size == 4
    assert seen.num_blocks > 0
    assert (seen.affinity("a"), seen.load_state("a")) == (0.8, "free")


def test_a_busy_server_names_who_runs_and_who_waits(load: Load) -> None:
    """There is one slot and one row: what does not run waits for another adapter to leave."""
    seen = Endpoint().read(load.busy.text)
    assert seen.errors == []
    assert seen.running == 1
    assert seen.waiting >= 1
    assert 0 < seen.kv_usage <= 1
    assert len(seen.active_models) == 1
    assert seen.waiting_models <= {"a", "b"} - seen.active_models
    (active,) = seen.active_models
    other = "b" if active == "a" else "a"
    assert seen.affinity(active) == 1.0
    assert seen.affinity(other) == (0.6 if other in seen.waiting_models else 0.0)
    assert seen.loaded is not None
    assert seen.loaded[active] == ("gpu", False)
    assert seen.load_state(other) in ("cpu", "saturated"), "nobody is told to evict who runs"


def test_a_draining_server_is_told_by_its_readiness_and_still_counts(load: Load) -> None:
    assert load.draining_status == {"/readyz": 503, "/health": 200, "/livez": 200, "/metrics": 200}
    seen = Endpoint().read(load.draining.text)
    assert seen.errors == []
    assert (seen.running, seen.waiting) == (1, 0), "what runs is finished and counted"
    assert load.draining.total("peft_serve_engine_state", state="draining") == 1
    assert load.drained_status == 200, "the answer that was begun is given to its end"


def test_the_newest_sample_is_the_one_of_the_last_scrape(load: Load) -> None:
    """The value is the time, so whoever keeps old series beside new ones finds the last."""
    ((_, before),), ((_, after),) = (each.samples[ENGINE_VLLM["lora"]] for each in (load.before, load.draining))
    assert time.time() - 3600 < before < after < time.time() + 1
    both = load.draining.text + "".join(
        line + "\n" for line in load.before.text.splitlines() if line.startswith(ENGINE_VLLM["lora"] + "{")
    )
    assert Endpoint().read(both).active_models == Endpoint().read(load.draining.text).active_models != set()


@pytest.mark.parametrize("key", ENGINE_VLLM)
def test_a_picker_misses_nothing_quietly(load: Load, key: str) -> None:
    """Without the family the picker would say so or fall back: with ours it reads every one of them."""
    name = ENGINE_VLLM[key]
    assert re.search(rf"^# TYPE {name} gauge$", load.busy.text, re.MULTILINE)
    without = "".join(line for line in load.busy.text.splitlines(True) if not re.match(rf"(# \w+ )?{name}\b", line))
    seen = Endpoint().read(without)
    may_be_missing = key in ("lora", "loaded", "gpu_loaded", "gpu_slots")
    assert seen.errors == ([] if may_be_missing else [f"metric family {name!r} not found"])
    if key == "gpu_loaded":
        assert seen.loaded, "the series alone say it too"


# ---- a moment, as the picker reads it ----


def state(**changed: Any) -> GatewayState:
    return replace(
        GatewayState(now_s=100.0, loaded=(), waiting=(), num_resident=0, max_resident=4, block_size=16, num_blocks=99),
        **changed,
    )


def rendered(*states: GatewayState) -> str:
    registry = CollectorRegistry()
    figures = GatewayFigures(registry, 'a "base"\\of\nmine')
    for each in states:
        figures.set_state(each)
    return generate_latest(registry).decode()


def on_device(*names: str, pinned: bool = False) -> list[LoadedAdapter]:
    return [LoadedAdapter(name=name, is_on_device=True, is_pinned=pinned) for name in names]


def on_host(*names: str) -> list[LoadedAdapter]:
    return [LoadedAdapter(name=name, is_on_device=False) for name in names]


def test_the_same_adapters_are_the_same_text_in_whatever_order() -> None:
    one = rendered(state(loaded=[*on_device("b", "a"), *on_host("d", "c")], waiting=["f", "e"], num_resident=2))
    other = rendered(state(loaded=[*on_host("c", "d"), *on_device("a", "b")], waiting=["e", "f", "e"], num_resident=2))
    assert one == other
    (line,) = re.findall(r"^vllm:lora_requests_info\{.*", one, re.MULTILINE)
    lists = 'max_lora="4",running_lora_adapters="a,b",waiting_lora_adapters="e,f"'
    assert line == f"vllm:lora_requests_info{{{lists}}} 100.0"


def test_labels_are_escaped_and_read_back() -> None:
    seen = Endpoint().read(rendered(state()))
    assert seen.base_model == 'a "base"\\of\nmine'


def test_an_adapter_is_counted_once_by_those_who_add_the_lists_up() -> None:
    seen = Endpoint().read(rendered(state(loaded=on_device("a", "b", "c"), waiting=["a", "b"], num_resident=3)))
    assert seen.affinity("new") == 0.8, "three of four slots are taken, whoever waits for one of the three"
    full = Endpoint().read(rendered(state(loaded=on_device("a", "b", "c"), waiting=["a", "d"], num_resident=3)))
    assert (full.affinity("new"), full.affinity("d"), full.affinity("a")) == (0.0, 0.6, 1.0)


def test_where_an_adapter_is_and_whether_it_stays() -> None:
    loaded = [*on_device("a"), *on_device("p", pinned=True), *on_host("h", "a")]
    seen = Endpoint().read(rendered(state(loaded=loaded, num_resident=2, max_resident=2)))
    assert seen.loaded == {"a": ("gpu", False), "p": ("gpu", True), "h": ("cpu", False)}
    assert [seen.load_state(name) for name in ("a", "h", "new")] == ["gpu", "cpu", "saturated"]
    gone = seen.read(rendered(state()))
    assert (gone.loaded, gone.num_gpu_loaded, gone.active_models) == ({}, 0, set())


def test_of_a_large_host_cache_those_used_last_are_told() -> None:
    names = [f"h{i}" for i in range(MAX_HOST_SERIES + 50)]
    seen = Endpoint().read(rendered(state(loaded=on_host(*names))))
    assert set(seen.loaded or ()) == set(names[50:])


def test_before_the_first_moment_nothing_is_claimed() -> None:
    seen = Endpoint().read(rendered())
    assert seen.loaded is None
    assert seen.errors == [
        f"metric family {ENGINE_VLLM[key]!r} not found" for key in ("queued", "running", "kv_usage", "cache")
    ]


def test_a_page_that_is_rendered_while_the_next_is_prepared_misses_nothing() -> None:
    """Pickers ask twenty times a second, beside Prometheus: every page has one sample of one moment."""
    registry = CollectorRegistry()
    figures = GatewayFigures(registry, "base")
    moments = [state(loaded=on_device(name), waiting=[name + "w"], num_resident=1) for name in ("a", "b")]
    figures.set_state(moments[0])
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            for each in moments:
                figures.set_state(each)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        for _ in range(100):
            seen = Endpoint().read(generate_latest(registry).decode())
            (active,), (waiting,) = seen.active_models, seen.waiting_models
            assert waiting == active + "w"
            assert seen.loaded == {active: ("gpu", False)}
    finally:
        ended.set()
        changing.join()


# ---- names ----


class PickedEngine(FakeEngine):
    """The fake engine in a state that a picker has to read."""

    waiting: tuple[AdapterId, ...] = ()
    host: tuple[AdapterId, ...] = ()

    def snapshot(self) -> EngineSnapshot:
        return replace(
            super().snapshot(),
            num_running=3,
            num_waiting=5,
            kv_usage=0.25,
            waiting_adapters=self.waiting,
            host_adapters=self.host,
        )


def picked(tiny_tokenizer: Any, folder: Path) -> tuple[World, PickedEngine]:
    world = make_world(tiny_tokenizer, folder)
    engine = PickedEngine(world.parts.codec)
    world = replace(world, engine=engine, parts=replace(world.parts, engine=engine))
    populate(world)
    return world, engine


async def test_a_picker_knows_adapters_by_the_names_that_requests_use(tiny_tokenizer: Any, tmp_path: Path) -> None:
    world, engine = picked(tiny_tokenizer, tmp_path)
    async with http(world) as client:

        async def look() -> Endpoint:
            return Endpoint().read((await client.get("/metrics")).text)

        nobody = await look()
        assert (nobody.waiting, nobody.running, nobody.kv_usage) == (5, 3, 0.25)
        assert (nobody.active_models, nobody.waiting_models) == (set(), set())
        for name in ("plain", "soft"):
            await client.post(f"/adapters/{name}/load")
        await client.post("/adapters/plain/pin")
        engine.waiting = engine.host = (world.adapters["complaints"],)
        engine.start()
        await client.post("/generate?adapter=complaints", json={"inputs": "a", "parameters": {"max_new_tokens": 1}})
        engine.stop()
        for _ in range(2):  # what was told before must not stay beside it
            seen = await look()
            assert (seen.active_models, seen.waiting_models) == ({"plain", "soft"}, {"complaints"})
            assert (seen.max_active_models, seen.block_size, seen.num_blocks) == (8, 16, 99)
            assert seen.loaded == {"plain": ("gpu", True), "soft": ("gpu", False), "complaints": ("cpu", False)}
            short = (await client.get("/metrics/gateway")).text
            assert set(re.findall(r"^# TYPE (\S+)", short, re.MULTILINE)) == set(ENGINE_VLLM.values())
            assert Endpoint().read(short) == seen


async def test_an_adapter_with_two_names_is_known_by_both(tiny_tokenizer: Any, tmp_path: Path) -> None:
    world, engine = picked(tiny_tokenizer, tmp_path)
    engine.start()
    async with http(world) as client:
        archive = (await client.get("/adapters/plain/archive")).content
        answer = await client.put("/adapters/copy", content=archive, headers={"content-type": "application/zip"})
        assert answer.status_code == 201, answer.text
        for name in ("plain", "copy"):
            await client.post(f"/adapters/{name}/load")
        seen = Endpoint().read((await client.get("/metrics")).text)
    engine.stop()
    assert seen.active_models == {"plain", "copy"}
    assert seen.num_gpu_loaded == 1, "they share a slot"
