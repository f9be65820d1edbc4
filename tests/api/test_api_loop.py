"""The event loop: events written out by hand, wide steps, slow readers, and how late the loop is."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import pairwise
from typing import Any

import httpx
import pytest

from peft_serve.api.json_response import compact_json
from peft_serve.api.loop_lag import watched_lag
from peft_serve.api.native import _token, _token_event, _top
from peft_serve.api.plan import Alternative, Token
from peft_serve.api.sse import EventStreamResponse, event
from peft_serve.core import BASE, Event, FinishEvent, FinishReason, Request, RequestId, TokenEvent
from peft_serve.engine.client import AT_ONCE, EngineClient
from peft_serve.engine.snapshot import EngineSnapshot, EngineState
from tests.api.api_fakes import World
from tests.api.test_api_sockets import open_request, wait_for

TEXTS = ["", " the", '"\\/\b\f\n\r\t', "\x00\x1f\x7f", "ü → 漢 🙂", "</script>", "\u2028\u2029"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("logprob", [None, 0.0, -0.25, -1e-07, -9999.0, -1.2345678901234567e-12])
@pytest.mark.parametrize("special", [True, False])
def test_a_token_is_written_as_the_encoder_would(text: str, logprob: float | None, special: bool) -> None:
    for top in ((), (Alternative(3, text, -0.5), Alternative(4, "x", -1e-09))):
        token = Token(id=17, text=text, logprob=logprob, special=special, top=top)
        content = {
            "index": 5,
            "token": _token(token),
            "top_tokens": _top(token),
            "generated_text": None,
            "details": None,
        }
        assert _token_event(5, token) == event(content, space=False)
        assert json.loads(_token_event(5, token)[5:]) == content


def test_half_a_surrogate_pair_is_refused_either_way() -> None:
    token = Token(id=1, text="\ud800", logprob=None, special=False)
    with pytest.raises(UnicodeEncodeError):
        _token_event(1, token)
    with pytest.raises(UnicodeEncodeError):
        compact_json(_token(token)).encode()


class HandFed:
    """An engine whose events the test delivers."""

    def __init__(self) -> None:
        self.deliver: Callable[[Sequence[Event]], None] = lambda _: None
        self.cancelled: list[RequestId] = []

    def connect(self, deliver: Callable[[Sequence[Event]], None]) -> None:
        self.deliver = deliver

    def submit(self, request: Request) -> None: ...

    def cancel(self, request: RequestId, reason: FinishReason) -> None:
        self.cancelled.append(request)

    def load(self, adapter: Any) -> None: ...

    def unload(self, adapter: Any) -> None: ...

    def set_pinned(self, adapter: Any, *, pinned: bool) -> None: ...

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(state=EngineState.RUNNING)


def named(i: int) -> RequestId:
    return RequestId(f"r{i}")


async def test_a_wide_step_is_handed_out_in_lots_and_in_order() -> None:
    count, steps = 3 * AT_ONCE + 5, 4
    engine = HandFed()
    client = EngineClient(engine, asyncio.get_running_loop())
    streams = [client.submit(Request(id=named(i), adapter=BASE, prompt=(1,))) for i in range(count)]
    woken: list[int] = []
    turns: list[int] = []

    async def read(i: int) -> list[int]:
        got = []
        async for news in streams[i]:
            woken.append(i)
            if isinstance(news, TokenEvent):
                got.append(news.token)
        return got

    async def turn() -> None:
        while len(woken) < count * (steps + 1):
            turns.append(len(woken))
            await asyncio.sleep(0)

    readers = [asyncio.ensure_future(read(i)) for i in range(count)]
    await asyncio.sleep(0)
    for step in range(steps):  # more than one step is there before the first is handed out
        engine.deliver([TokenEvent(request=named(i), index=step, token=100 * i + step) for i in range(count)])
    engine.deliver([FinishEvent(request=named(i), reason=FinishReason.LENGTH) for i in range(count)])
    watch = asyncio.ensure_future(turn())
    assert await asyncio.gather(*readers) == [[100 * i + step for step in range(steps)] for i in range(count)]
    await watch
    assert client.num_open == 0
    assert engine.cancelled == []
    gaps = [after - before for before, after in pairwise(turns)]
    assert max(gaps) <= 2 * AT_ONCE, "the loop turns between two lots"


async def test_who_leaves_between_two_lots_is_passed_over() -> None:
    engine = HandFed()
    client = EngineClient(engine, asyncio.get_running_loop())
    streams = [client.submit(Request(id=named(i), adapter=BASE, prompt=(1,))) for i in range(AT_ONCE + 2)]
    engine.deliver([TokenEvent(request=named(i), index=0, token=i) for i in range(AT_ONCE + 2)])
    assert isinstance(await anext(streams[0]), TokenEvent)
    streams[-1].close()
    assert isinstance(await anext(streams[-2]), TokenEvent)
    with pytest.raises(StopAsyncIteration):
        await anext(streams[-1])
    assert engine.cancelled == [named(AT_ONCE + 1)]


async def test_a_slow_reader_gets_everything_in_order() -> None:
    """`send` waits, as a server's does while its client does not read, and a comment may wait beside an event."""
    sent: list[bytes] = []
    is_read = asyncio.Event()

    async def events() -> AsyncIterator[bytes]:
        for i in range(50):
            yield b"%d;" % i

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            if len(sent) == 10:
                await is_read.wait()
            sent.append(message["body"])

    response = EventStreamResponse(events(), on_close=lambda: None, keep_alive_s=0.02)
    asyncio.get_running_loop().call_later(0.1, is_read.set)
    await response({"type": "http"}, asyncio.Event().wait, send)  # type: ignore[arg-type]
    told = b"".join(chunk for chunk in sent if not chunk.startswith(b":"))
    assert told == b"".join(b"%d;" % i for i in range(50))
    assert sent[-1] == b""


def test_a_reader_that_pauses_holds_nobody_up(url: str, world: World) -> None:
    long = {"max_new_tokens": 120, "ignore_eos": True, "top_n_tokens": 2}
    content = b""
    with open_request(url, "/generate_stream", {"inputs": "x", "parameters": long}) as slow:
        slow.settimeout(30)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        with httpx.Client(base_url=url, timeout=30) as client:
            quick = client.post("/generate_stream", json={"inputs": "x", "parameters": long}).text
        wait_for(lambda: world.engine.num_live == 0, "the engine does not wait for who reads")
        while not content.endswith(b"0\r\n\r\n"):
            read = slow.recv(4096)
            assert read, "the connection stays open until the answer is whole"
            content += read
    told = [line for line in content.split(b"\r\n") if line.startswith(b"data:")]
    texts = [json.loads(line[5:])["token"]["text"] for line in told]
    assert texts == [json.loads(line[5:])["token"]["text"] for line in quick.splitlines() if line]


async def test_lag_is_observed_while_the_watch_is_open() -> None:
    seen: list[float] = []
    async with watched_lag(seen.append, period_s=0.01):
        await asyncio.sleep(0.05)
        time.sleep(0.1)  # what is to be noticed
        await asyncio.sleep(0.05)
    count = len(seen)
    assert max(seen) >= 0.08
    assert min(seen) >= 0.0
    await asyncio.sleep(0.03)
    assert len(seen) == count


def test_the_lag_is_on_the_metrics_page(url: str) -> None:
    def is_counted() -> bool:
        page = httpx.get(f"{url}/metrics").text
        (count,) = [line for line in page.splitlines() if line.startswith("peft_serve_event_loop_lag_seconds_count")]
        return float(count.split()[1]) >= 1

    wait_for(is_counted, "the loop's lag is looked at")
