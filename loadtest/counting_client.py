"""A client that only counts: so cheap that a thousand streams leave the processor to the server.

It speaks just enough HTTP/1.1 for answers of this server: it finds where a whole answer ends, and counts the events of
a stream by the blank lines behind them. Nothing is parsed and nothing is kept.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BLANK = b"\n\n"
COMMENT = b": keep-alive"
LAST_CHUNK = b"0\r\n\r\n"
OPENED_AT_ONCE = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """What every connection sends again and again."""

    path: str
    body: dict[str, Any]

    def wire(self) -> bytes:
        """The request as it is sent."""
        body = json.dumps(self.body).encode()
        head = f"POST {self.path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What has come so far, on all connections together."""

    events: int  # of streams
    comments: int  # keep-alives
    answers: int  # that ended
    failed: int  # that ended with another status than 200, or broken off

    def since(self, before: "Counts") -> "Counts":
        """What came after `before`."""
        return Counts(
            events=self.events - before.events,
            comments=self.comments - before.comments,
            answers=self.answers - before.answers,
            failed=self.failed - before.failed,
        )


class CountingConnection(asyncio.Protocol):
    """One connection with one request in flight; the next is sent as soon as an answer is there."""

    def __init__(self, wire: bytes) -> None:
        self._wire = wire
        self._transport: asyncio.Transport | None = None
        self._head = b""  # of the answer, until it is whole
        self._left: int | None = None  # bytes of a whole answer still to come; None: it is a stream
        self._in_body = False
        self._tail = b""
        self.events = self.comments = self.answers = self.failed = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "a connection by TCP"
        self._transport = transport
        transport.write(self._wire)

    def connection_lost(self, _: Exception | None) -> None:
        if self._transport is not None:
            self.failed += 1

    def close(self) -> None:
        """Go away, whatever is still to come."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._in_body:
            self._take(data)
            return
        self._head += data
        head, end, body = self._head.partition(b"\r\n\r\n")
        if end:
            self._head, self._in_body = b"", True
            self._begin(head.lower())
            self._take(body)

    def _begin(self, head: bytes) -> None:
        self.failed += not head.startswith(b"http/1.1 200")
        _, found, length = head.partition(b"content-length:")
        self._left = int(length.split(b"\r\n")[0]) if found else None

    def _take(self, data: bytes) -> None:
        if self._left is None:
            # An end that is cut in two by the network is found when its second half comes.
            seen = self._tail + data
            comments = seen.count(COMMENT + BLANK) - self._tail.count(COMMENT + BLANK)
            self.comments += comments
            self.events += seen.count(BLANK) - self._tail.count(BLANK) - comments
            self._tail = seen[-len(COMMENT + BLANK) :]
            is_over = seen.endswith(LAST_CHUNK)
        else:
            self._left -= len(data)
            is_over = self._left <= 0
        if is_over:
            self._in_body, self._tail = False, b""
            self.answers += 1
            if self._transport is not None:
                self._transport.write(self._wire)


class CountingClient:
    """`count` connections that send `post`; open it on a running loop, and close it."""

    def __init__(self, port: int, post: Post, count: int) -> None:
        self._port = port
        self._wire = post.wire()
        self._count = count
        self._connections: Sequence[CountingConnection] = ()

    async def open(self, *, timeout_s: float = 0.0) -> None:
        """Open every connection, and wait `timeout_s` at most until each has got something."""
        loop, opened = asyncio.get_running_loop(), []
        for begin in range(0, self._count, OPENED_AT_ONCE):  # a listener's backlog is short
            made = [
                loop.create_connection(lambda: CountingConnection(self._wire), "127.0.0.1", self._port)
                for _ in range(begin, min(begin + OPENED_AT_ONCE, self._count))
            ]
            opened += [connection for _, connection in await asyncio.gather(*made)]
        self._connections = opened
        deadline = time.monotonic() + timeout_s
        while self.num_begun < self._count and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    @property
    def num_begun(self) -> int:
        """Connections that have got an event or an answer."""
        return sum(one.events > 0 or one.answers > 0 for one in self._connections)

    def counts(self) -> Counts:
        """What has come so far."""
        each = self._connections
        return Counts(
            events=sum(one.events for one in each),
            comments=sum(one.comments for one in each),
            answers=sum(one.answers for one in each),
            failed=sum(one.failed for one in each),
        )

    def close(self) -> None:
        """Close every connection."""
        for one in self._connections:
            one.close()
