"""Soak: slopes that outliers do not move, signs of a process, traffic that knows its answers, and a short run."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from loadtest.cli import main
from loadtest.server import RunningServer
from loadtest.signs import Signs, look
from loadtest.slopes import growth, theil_sen, thinned
from loadtest.soaking import Soaking, session_of
from loadtest.workloads.soak import judged


def test_a_slope_is_that_of_most_points() -> None:
    points = [(float(x), 3.0 * x + 1) for x in range(100)]
    assert theil_sen(points) == pytest.approx(3)
    points[50], points[98] = (50.0, 1e9), (98.0, -1e9)
    assert theil_sen(points) == pytest.approx(3, rel=0.01)
    assert growth(points) == pytest.approx(297, rel=0.01)
    assert theil_sen([(1.0, 5.0)]) == growth([]) == 0.0


def test_eight_hours_of_seconds_are_a_few_hundred_points() -> None:
    make = random.Random(0)
    points = [(float(x), 100 + x / 3600 + make.gauss(0, 5)) for x in range(8 * 3600)]
    assert len(thinned(points)) <= 400
    assert 3600 * theil_sen(points) == pytest.approx(1, abs=0.1)


SIGNS = Signs(
    at_s=0,
    rss_mib=500,
    descriptors=20,
    threads=12,
    kv_usage=0.1,
    running=4,
    waiting=2,
    on_device=4,
    on_host=20,
    store_mib=30,
)


@pytest.mark.parametrize(("leak_per_s", "is_kept"), [(0.0, True), (0.01, True), (0.5, False)])
def test_a_process_that_grows_is_found_and_its_warming_up_is_not(leak_per_s: float, is_kept: bool) -> None:
    signs = [replace(SIGNS, at_s=s, rss_mib=500 + leak_per_s * s - max(0, 60 - s)) for s in range(300)]
    middle, slope, grown, _, found = judged(signs, "rss_mib")
    assert found is is_kept
    assert slope == pytest.approx(3600 * leak_per_s, rel=0.1, abs=1)
    assert grown == pytest.approx(leak_per_s * 199, rel=0.1, abs=0.1)
    assert middle >= 500
    assert judged([replace(one, threads=10 + one.at_s / 20) for one in signs], "threads")[4] is False
    assert judged([], "rss_mib")[4] is False, "nothing was seen"


def test_a_process_is_looked_at_by_the_kernel_and_by_its_own_words(
    serve: Callable[[web.Application], str], tmp_path: Path
) -> None:
    async def metrics(_: web.Request) -> web.Response:
        text = 'vllm:kv_cache_usage_perc{m="x"} 0.25\npeft_serve_adapter_resident{adapter="a",tier="device"} 1\n'
        return web.Response(text=text + 'peft_serve_adapter_resident{adapter="b",tier="host"} 1\n')

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    process = tmp_path / "proc" / "7"
    (process / "fd").mkdir(parents=True)
    (process / "fd" / "0").touch()
    (process / "status").write_text("Name:\tx\nVmRSS:\t  2048 kB\nThreads:\t9\n")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "blob").write_bytes(bytes(1 << 20))
    server = RunningServer(url=serve(app), start_s=0, pid=7)
    signs = look(server, tmp_path / "store", 1.5, processes=tmp_path / "proc")
    assert (signs.rss_mib, signs.descriptors, signs.threads, signs.store_mib) == (2, 1, 9, 1)
    assert (signs.kv_usage, signs.on_device, signs.on_host) == (0.25, 1, 1)
    assert isnan(look(replace(server, pid=8), tmp_path / "store", 0, processes=tmp_path / "proc").rss_mib)


@pytest.mark.parametrize("fault", ["", "wrong", "500", "cut"])
def test_wrong_answers_errors_and_streams_that_break_off_are_counted(
    serve: Callable[[web.Application], str], fault: str
) -> None:
    asked = [0]

    async def generate(request: web.Request) -> web.Response:
        asked[0] += 1
        is_bad = asked[0] % 7 == 0
        text = f"{request.query.get('adapter')} {(await request.json())['inputs']}"
        if is_bad and fault == "500":
            return web.json_response({"error": "broken"}, status=500)
        text += "?" if is_bad and fault == "wrong" else ""
        if request.path == "/generate":
            return web.json_response({"generated_text": text})
        last = {} if is_bad and fault == "cut" else {"generated_text": text}
        return web.Response(text=f"data:{json.dumps({'token': {}})}\n\ndata:{json.dumps(last)}\n\n")

    async def act(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response({}, status=201)

    async def play() -> Soaking:
        async with session_of(RunningServer(url=url, start_s=0, pid=0)) as session:
            soaking = Soaking(session, ["a"], ["m"], [b"zip"], seed=3)
            for _ in range(150):
                await soaking.ask()
                await soaking.move()
            await soaking.leave()
            return soaking

    app = web.Application()
    app.router.add_post("/generate", generate)
    app.router.add_post("/generate_stream", generate)
    app.router.add_route("*", "/adapters/{name:.*}", act)
    url = serve(app)
    tally = asyncio.run(play()).tally
    found: dict[str, Any] = {"wrong": tally.num_wrong, "500": tally.num_errors, "cut": tally.num_broken}
    assert {name for name, count in found.items() if count} == ({fault} if fault else set())
    assert {what.split()[0] for what in tally.statuses} == {
        *("generate", "stream", "hang", "hurry", "upload", "delete", "unload")
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses names that transformers is about to drop
def test_a_few_seconds_against_a_server(tiny_work: Path, tmp_path: Path) -> None:
    words = f"soak --minutes 0.05 --quick --adapters 5 --threads 1 --concurrency 3 --work {tiny_work} --out {tmp_path}"
    assert main(words.split()) == 0
    (folder,) = tmp_path.iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert "0 answers of 500 and above, 0 wrong answers, 0 broken connections" in result["notes"][0]
    left = {row[0]: row[5] for row in result["rows"]}
    assert [left[name] for name in ("kv_usage", "running", "waiting", "on_device")] == [0, 0, 0, 0]
    lines = [json.loads(line) for line in (folder / "signs.jsonl").read_text().splitlines()]
    assert len(lines) >= 2
    assert all(line["rss_mib"] > 50 for line in lines)
