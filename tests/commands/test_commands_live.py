"""`peft-serve top` and `bench`: what a server does, seen from outside."""

from __future__ import annotations

import io
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from rich.console import Console

from peft_serve.commands.exits import CommandFailed
from peft_serve.commands.link import ServerLink
from peft_serve.commands.measuring import Load, quantiles
from peft_serve.commands.snapshots import between, samples, snapshots
from peft_serve.commands.top_view import colour_of, page, spark
from tests.api.api_fakes import World
from tests.commands.conftest import run

SNAPSHOT: dict[str, Any] = {
    "time": 12.0,
    "state": "running",
    "queue": {"waiting": 3, "loading": 1, "adapters": [{"name": "[b]sst2", "waiting": 2}]},
    "rows": [
        {"adapter": "trec", "method": "LORA", "phase": "decode", "tokens": 17},
        {"adapter": "trec", "method": "LORA", "phase": "prefill", "tokens": 9},
        {"adapter": "base", "method": "base", "phase": "decode", "tokens": 1},
    ],
    "slots": [{"slot": 1, "adapter": "trec", "bytes": 5, "in_flight": 2, "pinned": True}],
    "num_slots": 4,
    "tiers": {"device": {"adapters": 1, "bytes": 2048}, "host": {"adapters": 9, "bytes": 1}},
    "kv_usage": 0.5,
    "tokens_per_s": 412.0,
    "prompt_tokens_per_s": 90.0,
    "requests_per_s": 3.1,
    "step_ms": 21.3,
    "prefix_cache_hit_share": 0.4,
}


def drawn(snapshot: dict[str, Any], history: list[float]) -> str:
    console = Console(file=io.StringIO(), width=110, color_system=None)
    console.print(page(snapshot, history, "http://server"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def link_to(answer: Callable[[httpx.Request], httpx.Response]) -> ServerLink:
    return ServerLink("http://server", transport=httpx.MockTransport(answer))


def test_the_page_shows_queue_rows_and_slots() -> None:
    shown = drawn(SNAPSHOT, [1.0, 2.0, 4.0])
    assert "queue: 3, 1 loading" in shown
    assert "[b]sst2" in shown, "names are text"
    assert "batch: 3 rows" in shown
    assert "█▒" in shown, "a row that reads its prompt is lighter"
    assert "slots: 1 of 4" in shown
    assert "◆···" in shown, "a pinned slot is marked, the free ones are dots"
    assert "412" in shown
    assert "40% found" in shown
    assert "▂▄█" in shown


def test_a_server_that_stops_and_has_no_figures_yet_is_drawn_too() -> None:
    shown = drawn(SNAPSHOT | {"state": "draining", "step_ms": None, "prefix_cache_hit_share": None, "rows": []}, [0.0])
    assert "draining" in shown
    assert "batch: 0 rows" in shown


def test_many_adapters_are_counted_and_an_adapter_keeps_its_colour() -> None:
    rows = [{"adapter": f"a{i}", "method": "LORA", "phase": "decode", "tokens": 1} for i in range(20)]
    assert "and 8 more adapters" in drawn(SNAPSHOT | {"rows": rows}, [])
    assert colour_of("sst2") == colour_of("sst2")
    assert len({colour_of(f"a{i}") for i in range(40)}) > 6
    assert spark([]) == ""


def test_top_prints_one_snapshot_without_a_terminal(url: str, world: World) -> None:
    world.engine.load(world.adapters["plain"])
    said = run("top", "--url", url)
    assert said.code == 0
    assert "slots: 1 of 8" in said.out
    assert run("top", "--url", url, "--json").json["num_slots"] == 8
    assert run("top", "--url", "http://127.0.0.1:1").code == 3


def test_events_are_read_as_they_come_until_the_server_ends_them() -> None:
    body = f": keep-alive\n\ndata: {json.dumps(SNAPSHOT)}\n\ndata: {json.dumps(SNAPSHOT)}\n\n"
    with link_to(lambda _: httpx.Response(200, text=body)) as link:
        found = snapshots(link)
        assert [next(found), next(found)] == [SNAPSHOT, SNAPSHOT]
        with pytest.raises(CommandFailed, match="ended its stream"):
            next(found)


def test_a_server_without_events_is_read_by_its_metrics(url: str, world: World) -> None:
    """Of a server as it is, with the event route taken away."""
    world.engine.load(world.adapters["plain"])
    httpx.post(f"{url}/generate", json={"inputs": "x"})

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/events":
            return httpx.Response(404)
        return httpx.Response(200, text=httpx.get(f"{url}{request.url.path}").text)

    clock = itertools.count(0.0, 2.0)
    with link_to(answer) as link:
        found = snapshots(link, sleep=lambda _: None, clock=lambda: next(clock))
        first = next(found)
        httpx.post(f"{url}/generate", json={"inputs": "x", "parameters": {"max_new_tokens": 4, "ignore_eos": True}})
        second = next(found)
    assert set(SNAPSHOT) <= set(first)
    assert first["num_slots"] == 8
    assert (first["time"], first["tokens_per_s"]) == (2.0, 0.0)
    assert (second["tokens_per_s"], second["requests_per_s"]) == (2.0, 0.5)
    assert "batch: 0 rows" in drawn(second, [])


def test_figures_between_two_pages() -> None:
    earlier = samples("vllm:generation_tokens_total 10\nvllm:prompt_tokens_total 1\n")
    later = samples(
        "vllm:generation_tokens_total 30\nvllm:prompt_tokens_total 1\nvllm:num_requests_running 2\n"
        'vllm:lora_requests_info{max_lora="4",running_lora_adapters="a,b",waiting_lora_adapters="c"} 1\n'
        'peft_serve_adapter_resident{adapter="a",tier="device"} 1\npeft_serve_adapter_bytes{tier="device"} 99\n'
        "peft_serve_step_seconds_count 4\npeft_serve_step_seconds_sum 0.1\n"
        "vllm:prefix_cache_queries_total 8\nvllm:prefix_cache_hits_total 2\n"
    )
    found = between(earlier, later, 2.0)
    assert (found["tokens_per_s"], found["prompt_tokens_per_s"]) == (10.0, 0.0)
    assert (found["step_ms"], found["prefix_cache_hit_share"], found["num_running"]) == (25.0, 0.25, 2)
    assert [slot["adapter"] for slot in found["slots"]] == ["a", "b"]
    assert found["queue"]["adapters"] == [{"name": "c", "waiting": None}]
    assert found["tiers"]["device"] == {"adapters": 1, "bytes": 99}


def test_bench_asks_everybody_in_turn_and_tells_what_it_measured(url: str, world: World) -> None:
    words = ("bench", "--url", url, "-a", "plain", "-a", "base", "-c", "3", "--requests", "6", "-n", "5")
    found = run(*words, "--json").json
    assert (found["requests"], found["failed"], found["load"]["concurrency"]) == (6, {}, 3)
    shortest, longest = found["seconds"] - 0.001, found["seconds"] + 0.001  # it is told to the millisecond
    assert 30 / longest < found["output_tokens_per_s"] < 30 / max(shortest, 1e-9)
    assert 0 < found["ttft_ms"]["p50"] <= found["ttft_ms"]["p99"] <= found["total_ms"]["p99"]
    asked = [request.adapter for request in world.engine.seen]
    assert asked.count(world.adapters["plain"]) == asked.count("base") == 4, "3 measured and 1 to warm up"
    assert len({request.prompt for request in world.engine.seen}) == 8, "no prompt is asked twice"
    assert all(request.sampling.max_new_tokens == 5 for request in world.engine.seen)
    said = run(*words)
    assert "6 requests over 2 adapters by 3 callers" in said.out
    assert "the p99 is the slowest" in said.out


def test_bench_counts_failures_and_stops_at_an_adapter_that_is_not_there(url: str, world: World) -> None:
    assert run("bench", "--url", url, "-a", "nobody").code == 4
    assert run("bench", "--url", "http://127.0.0.1:1").code == 3
    world.engine.max_queue = 1
    world.engine.step_s = 0.05
    said = run("bench", "--url", url, "-c", "4", "--requests", "4", "-n", "3", "--json")
    assert (said.code, said.json["failed"]) == (1, {"overloaded": 3})


def test_latencies_take_the_time_they_take(url: str, world: World) -> None:
    world.engine.step_s = 0.02
    began = time.perf_counter()
    found = run("bench", "--url", url, "-c", "1", "--requests", "2", "-n", "6", "--json").json
    assert 15 < found["tpot_ms"]["p50"] < 200
    assert found["seconds"] < time.perf_counter() - began


def test_quantiles_of_few_and_of_none() -> None:
    assert quantiles([]) == {"p50": None, "p99": None, "mean": None}
    assert quantiles([1.0, 2.0, 9.0]) == {"p50": 2.0, "p99": 9.0, "mean": 4.0}
    assert quantiles([float(i) for i in range(1, 201)])["p99"] == 199.0


def test_prompts_differ_and_are_the_same_for_a_seed() -> None:
    load = Load(adapters=["base"], concurrency=1, num_requests=2, prompt_words=5, max_new_tokens=2, seed=3)
    assert load.prompt(0) == load.prompt(0) != load.prompt(1)
    assert len(load.prompt(0).split()) == 6
