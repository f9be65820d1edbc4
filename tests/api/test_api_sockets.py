"""What only a real socket shows: streams as they come, clients that leave, connections that go quiet."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from peft_serve.api.app import create_app
from peft_serve.api.sse import KEEP_ALIVE, EventStreamResponse, until_gone
from peft_serve.config import Settings
from peft_serve.core import FinishReason
from tests.api.api_fakes import World

LONG = {"max_new_tokens": 250, "ignore_eos": True}


def wait_for(fact: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 5
    while not fact():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def open_request(url: str, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request by hand and leave the socket open."""
    parts = urlsplit(url)
    content = json.dumps(body).encode()
    made = socket.create_connection((parts.hostname, parts.port))
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    made.sendall(head.encode() + content)
    return made


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/generate?adapter=plain", {"inputs": "x", "parameters": LONG}),
    ("/generate?adapter=plain", {"inputs": ["x", "y", "z"], "parameters": LONG}),
    ("/generate_stream?adapter=plain", {"inputs": "x", "parameters": LONG}),
    ("/v1/completions?adapter=plain", {"prompt": "x", "max_tokens": 250, "ignore_eos": True, "stream": True}),
    ("/v1/completions?adapter=plain", {"prompt": ["x", "y"], "max_tokens": 250, "ignore_eos": True, "stream": True}),
]


@pytest.mark.parametrize("phase", ["queued", "running"])
@pytest.mark.parametrize(("path", "body"), BODIES)
def test_a_client_that_leaves_frees_its_rows(
    url: str, world: World, path: str, body: dict[str, Any], phase: str
) -> None:
    num_inputs = len(body.get("inputs", body.get("prompt"))) if "[" in json.dumps(body) else 1
    world.engine.step_s = 0.02
    world.engine.held = phase == "queued"
    for _ in range(3):
        before = len(world.engine.cancelled)
        connection = open_request(url, path, body)
        wait_for(lambda: world.engine.num_live == num_inputs, "the request runs")
        if phase == "running" and "stream" in json.dumps([path, body]):
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.close()
        wait_for(lambda: world.engine.num_live == 0, "its rows are free")
        reasons = {reason for _, reason in world.engine.cancelled[before:]}
        assert reasons == {FinishReason.CANCELLED}
        wait_for(lambda: world.num_held == 0, "its adapter is given back")
    with httpx.Client(base_url=url) as client:
        page = client.get("/metrics").text
    assert f'outcome="cancelled"}} {3.0 * num_inputs}' in page


def test_a_stream_comes_as_it_is_made(url: str, world: World) -> None:
    world.engine.step_s = 0.05
    body = {"inputs": "x", "parameters": {"max_new_tokens": 6, "ignore_eos": True}}
    with httpx.Client(base_url=url) as client, client.stream("POST", "/generate_stream", json=body) as answer:
        assert float(answer.headers["x-time-to-first-token"]) >= 0
        times = [time.monotonic() for line in answer.iter_lines() if line]
    assert len(times) == 6
    assert times[-1] - times[0] > 0.15


async def test_a_quiet_stream_is_kept_alive_and_fails_by_event(world: World) -> None:
    parts = replace(world.parts, settings=Settings(keep_alive_s=0.02))
    world.engine.held = True
    transport = httpx.ASGITransport(app=create_app(parts))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        asked = asyncio.create_task(client.post("/generate_stream?adapter=plain", json={"inputs": "x"}))
        await asyncio.sleep(0.15)
        world.engine.fails[world.adapters["plain"]] = RuntimeError("lost")
        world.engine.held = False
        answer = await asked
    assert answer.status_code == 200, "the stream had begun"
    assert answer.text.count(": keep-alive") >= 2
    assert answer.text.rstrip().rsplit("data:", 1)[1].startswith('{"error"')


async def test_comments_stand_only_where_nothing_came() -> None:
    closed: list[str] = []

    async def events() -> Any:
        yield b"a"
        await asyncio.sleep(0.05)
        yield b"b"
        yield b"c"

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    response = EventStreamResponse(events(), on_close=lambda: closed.append("closed"), keep_alive_s=0.02)
    await response({"type": "http"}, asyncio.Event().wait, send)  # type: ignore[arg-type]
    await asyncio.sleep(0.05)  # nothing is written behind the end
    got = [message["body"] for message in sent[1:]]
    assert got[0] == b"a"
    assert got[-3:] == [b"b", b"c", b""]
    assert set(got[1:-3]) == {KEEP_ALIVE}
    assert [message.get("more_body") for message in sent[1:]] == [True] * (len(got) - 1) + [False]
    assert closed == ["closed"]


async def test_work_is_cancelled_when_the_client_leaves() -> None:
    left = asyncio.Event()
    ended: list[str] = []

    async def receive() -> Any:
        await left.wait()
        return {"type": "http.disconnect"}

    async def work() -> str:
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return "done"

    asyncio.get_running_loop().call_later(0.01, left.set)
    assert await until_gone(work(), receive) is None
    assert ended == ["cancelled"]
    assert await until_gone(asyncio.sleep(0, "done"), asyncio.Event().wait) == "done"  # type: ignore[arg-type]


def test_many_at_once_are_answered_as_alone(url: str, world: World) -> None:
    async def ask(client: httpx.AsyncClient, i: int) -> tuple[int, str]:
        name = ("plain", "soft", "base")[i % 3]
        answer = await client.post(f"/generate?adapter={name}", json={"inputs": f"text {i % 7}"})
        assert answer.status_code == 200
        return i, answer.json()["generated_text"]

    async def ask_all() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            alone = {i: (await ask(client, i))[1] for i in range(21)}
            for i, text in await asyncio.gather(*(ask(client, i) for i in range(150))):
                assert text == alone[i % 21]

    asyncio.run(ask_all())


def answer_of(url: str, head: str, body: bytes) -> bytes:
    """Send a whole request before a byte of the answer is read, as simple clients do."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        connection.sendall(head.encode() + body)
        answer = connection.recv(65536)
        while b"request_id" not in answer and (more := connection.recv(65536)):
            answer += more
    return answer


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("/adapters/.bad-name", "x: y", 422),
        ("/adapters/x", "content-digest: nonsense", 400),
        ("/adapters/x", "content-type: application/json", 415),
        ("/adapters/x", "content-encoding: gzip", 415),
        ("/generate", "x: y", 413),
    ],
)
def test_an_early_refusal_reaches_a_client_that_is_still_sending(url: str, path: str, header: str, status: int) -> None:
    body = bytes(24 << 20)  # more than sockets hold
    method = "PUT" if path.startswith("/adapters") else "POST"
    head = (
        f"{method} {path} HTTP/1.1\r\nhost: x\r\n{header}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    assert answer_of(url, head, body).startswith(f"HTTP/1.1 {status} ".encode())


def test_a_client_that_waits_to_be_told_is_not_waited_for(url: str) -> None:
    head = "PUT /adapters/.bad HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 99\r\n\r\n"
    began = time.monotonic()
    assert answer_of(url, head, b"").startswith(b"HTTP/1.1 422 ")
    assert time.monotonic() - began < 3


async def test_a_body_that_never_ends_is_drained_for_a_while_only(
    monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    from peft_serve.api import middleware

    monkeypatch.setattr(middleware, "DRAIN_S", 0.1)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.Event().wait()

    scope = {"type": "http", "method": "PUT", "path": "/adapters/.bad", "raw_path": b"", "query_string": b""}
    scope |= {"headers": [(b"content-length", b"100")], "http_version": "1.1", "scheme": "http", "root_path": ""}
    await asyncio.wait_for(create_app(world.parts)(scope, receive, send), 5)
    assert [message.get("more_body") for message in sent] == [None, True, None]
    assert sent[0]["status"] == 422
