"""edge: what becomes of the others when clients misbehave, or when there are too many of them?

Phases, each on a server of its own: *overload* asks for five times what the server can do, *fairness* lets one adapter
ask fifty times as much as each of four others, *disconnects* leaves at every stage of a request, *drain* tells a
server with streams to stop, and *slow* holds sockets open. Everything is sent to 127.0.0.1 and bounded in number.
"""

import asyncio
import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path

from loadtest.adapters import adapter_name
from loadtest.edge_client import Asked, ask, closed_loop, open_loop, probing, slow_sockets, wire
from loadtest.measure import percentile, ratio
from loadtest.report import Cell, Report
from loadtest.server import RunningServer
from loadtest.stage import Stage
from loadtest.workloads.policies import HEAVY, merged

PHASES = ("overload", "fairness", "disconnects", "drain", "slow")
WHEN = ("queued", "loading", "prefill", "decode", "last chunk")
TEXT = "Where is my order? It was due on Monday."
ROWS = 4
TOKENS = 16
OVERLOAD_TOKENS = 128  # long enough that the engine is what is short, and not the reading of requests
FACTOR = 5.0
LONGEST_WAIT = 0.25
"""What a request in a hurry asks for in X-Max-Wait, in times that an answer takes on an idle server."""
MOST_REQUESTS = 3000
HEAVY_TIMES = 50.0
NUM_LIGHT = 4
NUM_STREAMS = 32
QUIET_S = 30.0

Figure = tuple[str, str, float, float]
"""The phase, what is counted, what was found, and the most it may be."""


def run(stage: Stage, *, phases: Sequence[str], count: int | None) -> Report:
    """Play the phases; `count` is how often one leaves or drains, and how many sockets are slow."""
    found: list[Figure] = []
    for phase in phases or PHASES:
        found += _PHASES[phase](stage, count)
    return report(found)


def report(found: Sequence[Figure]) -> Report:
    """A row for each figure."""
    rows: list[tuple[Cell, ...]] = [
        (phase, what, value, nan if most == inf else most, "" if most == inf else _verdict(value, most))
        for phase, what, value, most in found
    ]
    return Report(
        name="edge",
        title="Clients that misbehave, and too many of them",
        columns=("phase", "figure", "found", "at most", "verdict"),
        rows=tuple(rows),
    )


def _verdict(value: float, most: float) -> str:
    return "met" if value <= most else "missed"


def _port(server: RunningServer) -> int:
    return int(server.url.rsplit(":", 1)[1])


def _body(*, stream: bool = False, tokens: int = TOKENS, text: str = TEXT) -> dict[str, object]:
    return {"inputs": text, "stream": stream, "parameters": {"max_new_tokens": tokens, "ignore_eos": True}}


def _overload(stage: Stage, _: int | None) -> list[Figure]:
    arguments = (f"--max-rows={ROWS}", f"--max-queue={ROWS}")
    with stage.server(name="server-overload", extra=arguments) as server:
        return asyncio.run(_overloaded(server, min(stage.options.duration_s, 30.0)))


async def _overloaded(server: RunningServer, seconds: float) -> list[Figure]:
    """Twice the same flood: of requests that wait as long as the queue lets them, and of ones that say how long."""
    port, body = _port(server), _body(tokens=OVERLOAD_TOKENS)
    patient = wire("/generate", body)
    await closed_loop(port, patient, connections=ROWS, seconds=min(2.0, seconds))
    alone = await closed_loop(port, patient, connections=1, seconds=seconds / 4)
    full = await closed_loop(port, patient, connections=ROWS, seconds=seconds / 4)
    rate = FACTOR * ratio(len(full), seconds / 4)
    unloaded_s = percentile([each.end_s for each in alone], 99)
    most_s = LONGEST_WAIT * percentile([each.end_s for each in alone], 50)
    before = _resident_bytes(server.pid)
    queued = await _flooded(server, "overload", patient, rate, seconds)
    timely = await _flooded(server, "overload, X-Max-Wait", wire("/generate", body, max_wait_s=most_s), rate, seconds)
    return [
        *queued.figures,
        ("overload", "200 p99 over unloaded p99", ratio(queued.accepted_p99_s, unloaded_s), inf),
        ("overload", "200 p99 over p99 with all rows busy", _over([queued.accepted_p99_s], full, 99), inf),
        *timely.figures,
        ("overload, X-Max-Wait", "200 p99 over unloaded p99", ratio(timely.accepted_p99_s, unloaded_s), 2.0),
        ("overload, X-Max-Wait", "answered 200, over those without it", ratio(timely.num_taken, queued.num_taken), inf),
        ("overload", "memory grown, MB", (_resident_bytes(server.pid) - before) / 1e6, 50.0),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flood:
    figures: tuple[Figure, ...]
    accepted_p99_s: float
    num_taken: int


async def _flooded(server: RunningServer, phase: str, sent: bytes, rate: float, seconds: float) -> _Flood:
    waiting: list[float] = []
    watch = asyncio.create_task(_watch_queue(server, waiting))
    async with probing(_port(server), "/livez") as probes:
        answers = await open_loop(_port(server), sent, rate_per_s=rate, count=min(MOST_REQUESTS, int(rate * seconds)))
    watch.cancel()
    taken = [each.end_s for each in answers if each.status == 200]
    refused = [each.end_s for each in answers if each.status == 429]
    figures: tuple[Figure, ...] = (
        (phase, "requests", float(len(answers)), inf),
        (phase, "answered 200", float(len(taken)), inf),
        (phase, "answered neither 200 nor 429", float(len(answers) - len(taken) - len(refused)), 0.0),
        (phase, f"longest queue seen (cap {ROWS})", max(waiting, default=nan), float(ROWS)),
        (phase, "429 p99, ms", 1e3 * percentile(refused, 99), 50.0),
        (phase, "/livez p99, ms", 1e3 * percentile(probes.times_s, 99), 100.0),
    )
    return _Flood(figures=figures, accepted_p99_s=percentile(taken, 99), num_taken=len(taken))


def _over(times_s: Sequence[float], others: Sequence[Asked], rank: float) -> float:
    return ratio(percentile(times_s, rank), percentile([each.end_s for each in others], rank))


async def _watch_queue(server: RunningServer, waiting: list[float]) -> None:
    while True:
        samples = await asyncio.to_thread(server.metrics)
        waiting.append(sum(by for name, by in samples.items() if name.startswith("vllm:num_requests_waiting")))
        await asyncio.sleep(0.1)


def _resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _fairness(stage: Stage, _: int | None) -> list[Figure]:
    names = tuple(map(adapter_name, range(NUM_LIGHT + 1)))
    with stage.server(name="server-fair", num_adapters=len(names), extra=("--scheduling-policy=fair",)) as server:
        stage.warm(server, names)
        capacity = stage.calibrate(server).capacity_rps
        rate, seconds = 1.2 * capacity / HEAVY_TIMES, min(stage.options.duration_s, 30.0)
        light = stage.trace(adapters=names[1:], rate_per_s=NUM_LIGHT * rate, duration_s=seconds, popularity="uniform")
        heavy = stage.trace(adapters=(HEAVY,), rate_per_s=HEAVY_TIMES * rate, duration_s=seconds, seed=1)
        found = [
            [one for one in stage.open_loop(server, trace, label) if one.adapter != HEAVY]
            for label, trace in (("light alone", light), ("light beside a heavy one", merged(light, heavy)))
        ]
    p95 = [percentile([one.ttft_s for one in each if one.ok and one.ttft_s is not None], 95) for each in found]
    return [
        ("fairness", "requests of the light ones", float(len(found[1])), inf),
        ("fairness", "of those, failed", float(sum(not one.ok for one in found[1])), 0.0),
        ("fairness", "time to the first token p95 alone, ms", 1e3 * p95[0], inf),
        ("fairness", "p95 beside the heavy one over alone", ratio(p95[1], p95[0]), 1.5),
    ]


def _disconnects(stage: Stage, count: int | None) -> list[Figure]:
    times = count or (10 if stage.options.quick else 200)
    with stage.server(name="server-disconnects", num_adapters=1, extra=(f"--max-rows={ROWS}",)) as server:
        stage.warm(server, (adapter_name(0),))
        return [figure for when in WHEN for figure in asyncio.run(_left(server, when, times))]


async def _left(server: RunningServer, when: str, times: int) -> list[Figure]:
    await _quiet(server)
    before = _held(server)
    port, path = _port(server), f"/generate?adapter={adapter_name(0)}"
    busy = [
        asyncio.create_task(ask(port, wire(path, _body(tokens=1000)))) for _ in range(ROWS if when == "queued" else 0)
    ]
    if busy:
        await asyncio.sleep(0.3)
    for number in range(times):
        match when:
            case "loading":
                await ask(port, wire(f"/adapters/{adapter_name(0)}/unload", {}))
                await ask(port, wire(path, _body()), leave_after_s=0.002 * (1 + number % 10))
            case "prefill":
                await ask(port, wire(path, _body(text=TEXT * 60)), leave_after_s=0.002 * (1 + number % 10))
            case "decode":
                await ask(port, wire(path, _body(stream=True, tokens=500)), leave_at_event=1 + number % 8)
            case "last chunk":
                await ask(port, wire(path, _body(stream=True)), leave_at_event=TOKENS)
            case _:
                await ask(port, wire(path, _body()), leave_after_s=0.02)
    for task in busy:
        task.cancel()
    await asyncio.gather(*busy, return_exceptions=True)
    took_s = await _quiet(server)
    after = _held(server)
    return [
        (f"disconnect, {when}", f"left running or held after {times}", after[0], 0.0),
        (f"disconnect, {when}", "descriptors more than before", after[1] - before[1], 0.0),
        (f"disconnect, {when}", "seconds until all was free", took_s, 2.0),
    ]


async def _quiet(server: RunningServer) -> float:
    """Wait until nothing runs and no connection is open but ours; gives how long that took."""
    began_s = time.monotonic()
    while _held(server)[0] and time.monotonic() - began_s < QUIET_S:
        await asyncio.sleep(0.02)
    took_s = time.monotonic() - began_s
    await asyncio.sleep(1.0)  # the server's side of what was closed
    return took_s


def _held(server: RunningServer) -> tuple[float, float]:
    """What runs, waits or is leased, and open descriptors: these first, for a question is a connection too."""
    descriptors = float(len(os.listdir(f"/proc/{server.pid}/fd")))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{server.url}/adapters", timeout=10) as answer:
        adapters = json.loads(answer.read())
    entries = adapters["adapters"] if isinstance(adapters, dict) else adapters
    leased = sum(entry.get("in_flight") or 0 for entry in entries)
    return server.num_running() + leased, descriptors


def _drain(stage: Stage, count: int | None) -> list[Figure]:
    times = count or (2 if stage.options.quick else 50)
    found: list[Asked] = []
    with stage.counting("drains", times) as tick:
        for number in range(times):
            with stage.server(name=f"server-drain-{number}", extra=("--drain-delay-s=0.2", "--drain-s=60")) as server:
                found += asyncio.run(_drained(server))
            tick()
    return [
        ("drain", f"streams told to end, {times} times {NUM_STREAMS}", float(len(found)), inf),
        ("drain", "truncated", float(sum(not one.is_whole or one.num_events != TOKENS * 4 for one in found)), 0.0),
    ]


async def _drained(server: RunningServer) -> list[Asked]:
    port, sent = _port(server), wire("/generate", _body(stream=True, tokens=TOKENS * 4))
    streams = [asyncio.create_task(ask(port, sent)) for _ in range(NUM_STREAMS)]
    while sum(map(bool, (task.done() for task in streams))) == 0 and await _running(server) < NUM_STREAMS:
        await asyncio.sleep(0.01)
    os.kill(server.pid, signal.SIGTERM)
    return list(await asyncio.gather(*streams))


async def _running(server: RunningServer) -> float:
    return await asyncio.to_thread(server.num_running)


def _slow(stage: Stage, count: int | None) -> list[Figure]:
    sockets = count or (50 if stage.options.quick else 500)
    with stage.server(name="server-slow") as server:
        return asyncio.run(_beside_slow(server, sockets, min(stage.options.duration_s, 45.0)))


async def _beside_slow(server: RunningServer, sockets: int, seconds: float) -> list[Figure]:
    port, sent = _port(server), wire("/generate", _body())
    await closed_loop(port, sent, connections=ROWS, seconds=min(2.0, seconds))
    alone = await closed_loop(port, sent, connections=ROWS, seconds=seconds)
    async with slow_sockets(port, sockets), probing(port, "/livez") as probes:
        beside = await closed_loop(port, sent, connections=ROWS, seconds=seconds)
    return [
        ("slow", "sockets held", float(sockets), inf),
        ("slow", "failed beside them", float(sum(each.status != 200 for each in beside)), 0.0),
        ("slow", "p95 beside them over alone", _over([each.end_s for each in beside], alone, 95), 2.0),
        ("slow", "/livez p99, ms", 1e3 * percentile(probes.times_s, 99), 100.0),
    ]


_PHASES: dict[str, Callable[[Stage, int | None], list[Figure]]] = {
    "overload": _overload,
    "fairness": _fairness,
    "disconnects": _disconnects,
    "drain": _drain,
    "slow": _slow,
}
