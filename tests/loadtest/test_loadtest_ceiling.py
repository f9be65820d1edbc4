"""The ceiling of the HTTP side: the engine that computes nothing, the client that only counts, the watch, the table."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest

from loadtest.counting_client import CountingClient, CountingConnection, Counts, Post
from loadtest.fake_engine import FakeEngine
from loadtest.loop_watch import PATH, LoopFigures, LoopWatch
from loadtest.workloads.ceiling import Found, fake_cases, real_cases, report
from peft_serve.core import BASE, Event, FinishEvent, FinishReason, Request, RequestId, SamplingParams, TokenEvent


def asked(name: str, num_tokens: int) -> Request:
    return Request(id=RequestId(name), adapter=BASE, prompt=(1, 2), sampling=SamplingParams(max_new_tokens=num_tokens))


def test_the_fake_engine_gives_each_row_a_token_a_step_and_no_more_rows_than_it_has() -> None:
    steps: list[list[Event]] = []
    over = threading.Event()

    def deliver(events: Sequence[Event]) -> None:
        steps.append(list(events))
        if sum(isinstance(event, FinishEvent) for step in steps for event in step) == 4:
            over.set()

    engine = FakeEngine((7, 8), step_s=0.01, max_rows=2)
    engine.connect(deliver)
    for name, count in (("a", 3), ("b", 1), ("c", 2), ("d", 1000)):
        engine.submit(asked(name, count))
    assert (engine.snapshot().num_running, engine.snapshot().num_waiting) == (2, 2)
    began = time.monotonic()
    engine.start()
    threading.Timer(0.08, lambda: engine.cancel(RequestId("d"), FinishReason.CANCELLED)).start()
    assert over.wait(5)
    engine.stop()
    assert time.monotonic() - began >= 0.05
    tokens = [[event for event in step if isinstance(event, TokenEvent)] for step in steps]
    assert max(map(len, tokens)) == 2
    of_a = [event for step in tokens for event in step if event.request == "a"]
    assert [(event.index, event.token) for event in of_a] == [(0, 7), (1, 8), (2, 7)]
    ends = {event.request: event for step in steps for event in step if isinstance(event, FinishEvent)}
    assert [ends[RequestId(name)].reason.value for name in "abcd"] == ["length", "length", "length", "cancelled"]
    assert ends[RequestId("a")].num_output_tokens == 3


WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 14\r\nx: y\r\n\r\n" + b'{"text":"\\n\\n"'
STREAM = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"".join(
    b"%x\r\n%s\r\n" % (len(part), part) for part in (b"data:{}\n\n", b": keep-alive\n\n", b"data:{}\n\ndata:[]\n\n")
)
REFUSED = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\n\r\n{}"


class Wire(asyncio.Transport):
    """A transport that keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_the_client_counts_however_the_bytes_are_cut(size: int) -> None:
    wire, connection = Wire(), CountingConnection(b"ask")
    connection.connection_made(wire)
    said = WHOLE + STREAM + b"0\r\n\r\n" + REFUSED + STREAM
    ends = [len(WHOLE), len(WHOLE) + len(STREAM) + 5, len(said) - len(STREAM), len(said)]  # one answer at a time
    for begin, end in zip([0, *ends], ends, strict=False):
        for at in range(begin, end, size):
            connection.data_received(said[at : min(at + size, end)])
    assert (connection.answers, connection.events, connection.comments, connection.failed) == (3, 6, 2, 1)
    assert wire.written == [b"ask"] * 4
    connection.connection_lost(None)
    assert connection.failed == 2


async def test_connections_are_opened_counted_and_watched() -> None:
    left: list[object] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"POST /x HTTP/1.1" in head
        writer.write(STREAM)
        with suppress(ConnectionResetError):
            await reader.read()
        writer.close()
        with suppress(ConnectionResetError):
            await writer.wait_closed()
        left.append(writer)

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    client = CountingClient(server.sockets[0].getsockname()[1], Post(path="/x", body={"a": 1}), 60)
    await client.open(timeout_s=5.0)
    assert client.num_begun == 60
    before = client.counts()
    client.close()
    assert (before.events, before.comments, before.failed) == (180, 60, 0)
    assert client.counts().since(before) == Counts(events=0, comments=0, answers=0, failed=0)
    while len(left) < 60:
        await asyncio.sleep(0.01)
    server.close()
    await server.wait_closed()


async def test_the_watch_tells_lag_and_computing_time_and_passes_the_rest_on() -> None:
    passed: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope.get("path", scope["type"]))

    async def call(method: str, path: str) -> bytes:
        said: list[bytes] = []

        async def send(message: Any) -> None:
            said.append(message.get("body", b""))

        await watch({"type": "http", "method": method, "path": path}, asyncio.Event().wait, send)  # type: ignore[arg-type]
        return b"".join(said)

    watch = LoopWatch(app)
    await call("GET", "/generate")
    assert passed == ["/generate"]
    await call("POST", PATH)
    await asyncio.sleep(0.05)
    spin(lambda: None, 0.1)
    await asyncio.sleep(0.03)
    figures = LoopFigures(**json.loads(await call("GET", PATH)))
    assert figures.lag_max_s >= 0.05
    assert figures.lag_p50_s <= figures.lag_p99_s <= figures.lag_max_s
    assert 0.05 <= figures.loop_cpu_s <= figures.process_cpu_s + 0.01
    assert passed == ["/generate"]


def spin(act: Callable[[], None], seconds: float) -> None:
    """Compute for so long."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        act()


def test_the_table_holds_the_lag_of_streams_against_its_target() -> None:
    def figures(lag_s: float) -> LoopFigures:
        return LoopFigures(
            seconds=2.0, loop_cpu_s=1.0, process_cpu_s=1.5, lag_p50_s=lag_s / 2, lag_p99_s=lag_s, lag_max_s=2 * lag_s
        )

    cases = fake_cases(1000, 20.0)
    counts = [
        Counts(events=0 if not case.streams else 4000, comments=1, answers=0 if case.streams else 500, failed=0)
        for case in cases
    ]
    lags = (0.05, 0.05, 0.019, 0.021)
    found = [
        Found(case=case, begun=case.connections, counts=one, loop=figures(lag))
        for case, one, lag in zip(cases, counts, lags, strict=True)
    ]
    shown = report(found, over="a fake engine")
    rows = [dict(zip(shown.columns, row, strict=True)) for row in shown.rows]
    assert [row["requests/s"] for row in rows] == [250.0, 250.0, 0.0, 0.0]
    assert [row["tokens/s"] for row in rows] == [2000.0] * 4
    assert rows[0]["loop ms a request"] == 2.0
    assert [row["loop s per 1,000 tokens"] for row in rows] == [0.25] * 4
    assert [note.rsplit(" ", 1)[1] for note in shown.notes] == ["met", "missed"]
    assert real_cases(10, 4)[0].arguments == ("--real", "--max-rows=4")
