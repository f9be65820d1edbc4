"""ceiling: how much can the HTTP side carry, whatever the model?

The real application stands in a process of its own over an engine that computes nothing (`loadtest.fake_engine`), or,
with ``--real``, over the base. First many connections ask for short whole answers as fast as they are served, which
gives the ceiling of requests a second; then as many streams as `streams` run at once, and the event loop is watched.
What holds on a shared machine is computing time: of the loop's thread, for each request and for 1,000 tokens.
"""

import asyncio
import json
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtest.counting_client import CountingClient, Counts, Post
from loadtest.loop_watch import PATH, LoopFigures
from loadtest.measure import ratio
from loadtest.plots import Plot
from loadtest.report import Cell, Report
from loadtest.server import RunningServer, ServerCommand, running_server
from loadtest.stage import Stage

PROGRAM = (sys.executable, "-m", "loadtest.ceiling_server")
CONNECTIONS = 32
SHORT = 8
BEGIN_S = 30.0
"""How long streams that all run at once get to begin; a server that cannot keep up with them begins few."""
LAG_TARGET_S = 0.02
TEXT = "Where is my order? It was due on Monday, and nobody has said a word about it since."


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kind of traffic on a server of its own."""

    name: str
    post: Post
    connections: int
    arguments: tuple[str, ...]
    streams: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a case came to."""

    case: Case
    begun: int  # connections that had got something when it was over
    counts: Counts
    loop: LoopFigures


def run(stage: Stage, *, real: bool, streams: int, steps_per_s: float, max_rows: int) -> Report:
    """Play every case `duration_s` long."""
    found = []
    cases = real_cases(streams, max_rows) if real else fake_cases(streams, steps_per_s)
    for case in cases:
        with _server(stage, case) as server, stage.counting(case.name, 1, seconds=stage.options.duration_s):
            found.append(asyncio.run(_played(case, server, stage.options.duration_s)))
    return report(found, over="the base itself" if real else f"a fake engine, {steps_per_s:g} steps/s under streams")


def fake_cases(streams: int, steps_per_s: float) -> list[Case]:
    """Whole answers without a pause between steps, then streams at the given pace."""
    at_once = ("--step-ms=0", f"--max-rows={CONNECTIONS}")
    paced = (f"--step-ms={1e3 / steps_per_s:g}", f"--max-rows={streams}")
    endless = 1 << 19
    return [
        Case(name="whole", post=native(SHORT), connections=CONNECTIONS, arguments=at_once, streams=False),
        Case(name="whole, OpenAI", post=openai(SHORT), connections=CONNECTIONS, arguments=at_once, streams=False),
        Case(name="streams", post=native(endless, stream=True), connections=streams, arguments=paced),
        Case(name="streams, OpenAI", post=openai(endless, stream=True), connections=streams, arguments=paced),
    ]


def real_cases(streams: int, max_rows: int) -> list[Case]:
    """Streams of 64 tokens, of which `max_rows` run at once and the others wait their turn."""
    arguments = ("--real", f"--max-rows={max_rows}")
    return [Case(name="streams", post=native(64, stream=True), connections=streams, arguments=arguments)]


def native(num_tokens: int, *, stream: bool = False) -> Post:
    """A native request."""
    body = {"inputs": TEXT, "parameters": {"max_new_tokens": num_tokens, "ignore_eos": True}}
    return Post(path="/generate_stream" if stream else "/generate", body=body)


def openai(num_tokens: int, *, stream: bool = False) -> Post:
    """OpenAI's."""
    fields = {"prompt": TEXT, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
    return Post(path="/v1/completions", body={"model": "base", **fields})


@contextmanager
def _server(stage: Stage, case: Case) -> Iterator[RunningServer]:
    arguments = (*case.arguments, f"--num-threads={stage.options.num_threads}")
    environment = {"OMP_NUM_THREADS": str(stage.options.num_threads), "PEFT_SERVE_MAX_NEW_TOKENS": str(1 << 20)}
    command = ServerCommand(base=_base(stage), arguments=arguments, environment=environment, program=PROGRAM)
    log = stage.options.folder / f"{''.join(c if c.isalnum() else '-' for c in case.name)}.log"
    with running_server(command, log) as server:
        yield server


def _base(stage: Stage) -> Path:
    from peft_serve.model.loader import DEMO_NAMES, locate  # torch: seconds that other commands do without

    return Path(locate(stage.options.base)) if stage.options.base in DEMO_NAMES else stage.base()


async def _played(case: Case, server: RunningServer, duration_s: float) -> Found:
    client = CountingClient(int(server.url.rsplit(":", 1)[1]), case.post, case.connections)
    try:
        await client.open(timeout_s=BEGIN_S if case.streams and "--real" not in case.arguments else 0.0)
        await asyncio.sleep(min(2.0, duration_s / 4))  # what the first requests meet is not what the others do
        await asyncio.to_thread(_asked, server.url, "POST")
        before = client.counts()
        await asyncio.sleep(duration_s)
        counts, begun = client.counts().since(before), client.num_begun
        figures = LoopFigures(**json.loads(await asyncio.to_thread(_asked, server.url, "GET")))
    finally:
        client.close()
    return Found(case=case, begun=begun, counts=counts, loop=figures)


def _asked(url: str, method: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url + PATH, method=method), timeout=60.0) as answer:
        body: bytes = answer.read()
    return body


def report(found: Sequence[Found], *, over: str) -> Report:
    """One row for each case."""
    return Report(
        name="ceiling",
        title=f"The HTTP side over {over}",
        columns=(
            *(
                "traffic",
                "connections",
                "begun",
                "requests/s",
                "tokens/s",
                "loop ms a request",
                "loop s per 1,000 tokens",
            ),
            *("loop's share of a core", "lag p50 ms", "lag p99 ms", "lag max ms", "keep-alives", "failed"),
        ),
        rows=tuple(_row(one) for one in found),
        notes=tuple(_lag_note(one) for one in found if one.case.streams),
        plot=Plot(
            title="How late the event loop is",
            x_label="traffic",
            y_label="lag, ms",
            series={
                name: tuple((float(at), 1e3 * getattr(one.loop, field)) for at, one in enumerate(found))
                for name, field in (("p50", "lag_p50_s"), ("p99", "lag_p99_s"))
            },
            ticks=tuple(one.case.name for one in found),
            level=1e3 * LAG_TARGET_S,
            level_label="target of p99",
        ),
        settings={"short_tokens": SHORT},
    )


def _row(one: Found) -> tuple[Cell, ...]:
    counts, loop = one.counts, one.loop
    tokens = counts.events if one.case.streams else counts.answers * SHORT
    return (
        *(one.case.name, one.case.connections, one.begun, counts.answers / loop.seconds, tokens / loop.seconds),
        *(1e3 * ratio(loop.loop_cpu_s, counts.answers), 1e3 * ratio(loop.loop_cpu_s, tokens)),
        *(loop.loop_cpu_s / loop.seconds, 1e3 * loop.lag_p50_s, 1e3 * loop.lag_p99_s, 1e3 * loop.lag_max_s),
        *(counts.comments, counts.failed),
    )


def _lag_note(one: Found) -> str:
    lag_s = one.loop.lag_p99_s
    verdict = "met" if lag_s < LAG_TARGET_S else "missed"
    what = f"{one.case.name}: lag p99 of the loop under {one.case.connections}"
    return f"{what} = {1e3 * lag_s:.1f} ms, target below {1e3 * LAG_TARGET_S:g} ms: {verdict}"
