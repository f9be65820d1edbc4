"""A client with bad manners: it leaves in the middle, sends slowly, and notes how it was answered.

It speaks just enough HTTP/1.1 for this server, one request to a connection, and sends to 127.0.0.1 alone.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"
OPENED_AT_ONCE = 50
TRICKLE_S = 1.0
SLOW_BEGINNINGS = (b"", b"POST /generate HTTP/1.1\r\nhost: 127.0.0.1\r\nx-slow: ")
SLOW_BODY = b"POST /generate HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 100000\r\n\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How a request ended. `status` is 0 without an answer; times in seconds from the connection's beginning."""

    status: int
    is_whole: bool
    num_events: int
    first_s: float
    end_s: float


def wire(path: str, body: dict[str, Any] | None, *, max_wait_s: float | None = None) -> bytes:
    """A request as it is sent; a GET without a body. With `max_wait_s` it would be refused rather than wait longer."""
    content = b"" if body is None else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    head = f"{method} {path} HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\ncontent-type: application/json\r\n"
    if max_wait_s is not None:
        head += f"x-max-wait: {max_wait_s:.4f}\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def is_whole(answer: bytes) -> bool:
    """Whether this is an answer to its end."""
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end:
        return False
    _, found, length = head.lower().partition(b"content-length:")
    return len(body) == int(length.split(b"\r\n")[0]) if found else body.endswith(b"0\r\n\r\n")


async def ask(
    port: int, sent: bytes, *, leave_after_s: float | None = None, leave_at_event: int | None = None
) -> Asked:
    """Send a request and read its answer to the end, or leave: after a time, or with so many events of a stream."""
    began_s, first_s, answer = time.perf_counter(), 0.0, b""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        async with asyncio.timeout(leave_after_s):
            writer.write(sent)
            while piece := await reader.read(1 << 16):
                first_s = first_s or time.perf_counter() - began_s
                answer += piece
                if leave_at_event is not None and answer.count(b"data:") >= leave_at_event:
                    break
    except (TimeoutError, OSError):
        pass  # left, or cut off: what came until then tells
    finally:
        writer.transport.abort()
    return Asked(
        status=int(answer.split(b" ", 2)[1]) if answer else 0,
        is_whole=is_whole(answer),
        num_events=answer.count(b"data:"),
        first_s=first_s,
        end_s=time.perf_counter() - began_s,
    )


async def closed_loop(port: int, sent: bytes, *, connections: int, seconds: float) -> list[Asked]:
    """As many requests in flight as there are connections, for so long."""
    until_s, found = time.perf_counter() + seconds, list[Asked]()

    async def repeat() -> None:
        while time.perf_counter() < until_s:
            found.append(await ask(port, sent))

    await asyncio.gather(*(repeat() for _ in range(connections)))
    return found


async def open_loop(port: int, sent: bytes, *, rate_per_s: float, count: int) -> list[Asked]:
    """`count` requests at an even pace, whatever becomes of them."""
    began_s, tasks = time.perf_counter(), list[asyncio.Task[Asked]]()
    for number in range(count):
        await asyncio.sleep(max(0.0, began_s + number / rate_per_s - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(port, sent)))
    return list(await asyncio.gather(*tasks))


@dataclass(slots=True)
class Probes:
    """How long a route took, asked every `interval_s`, beside whatever the block does."""

    times_s: list[float] = field(default_factory=list)
    bodies: list[str] = field(default_factory=list)


@asynccontextmanager
async def probing(port: int, path: str, *, interval_s: float = 0.1) -> AsyncIterator[Probes]:
    """Ask a route again and again."""
    found = Probes()

    async def repeat() -> None:
        while True:
            found.times_s.append((await ask(port, wire(path, None))).end_s)
            await asyncio.sleep(interval_s)

    task = asyncio.create_task(repeat())
    try:
        yield found
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def slow_sockets(port: int, count: int) -> AsyncIterator[None]:
    """`count` connections that say nothing, or a byte a second of a head or of a body; who is let go comes again."""
    beginnings: Sequence[bytes] = (*SLOW_BEGINNINGS, SLOW_BODY)

    async def hold(number: int) -> None:
        while True:
            with suppress(OSError):
                await _trickle(port, beginnings[number % len(beginnings)])
            await asyncio.sleep(TRICKLE_S)

    tasks = []
    for number in range(count):
        tasks.append(asyncio.create_task(hold(number)))
        if number % OPENED_AT_ONCE == 0:
            await asyncio.sleep(0.05)  # a listener's backlog is short
    await asyncio.sleep(TRICKLE_S)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _trickle(port: int, beginning: bytes) -> None:
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(beginning)
        while not reader.at_eof():
            await asyncio.sleep(TRICKLE_S)
            writer.write(b"a" if beginning else b"")
            await writer.drain()
    finally:
        writer.transport.abort()
