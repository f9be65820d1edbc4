"""Server-sent events: a response that writes events, keeps a quiet connection alive and notices who left.

Owns the connection of one stream. What the events say is its caller's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Final, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from peft_serve.api.json_response import compact_json

T = TypeVar("T")

KEEP_ALIVE: Final = b": keep-alive\n\n"
DONE: Final = b"data: [DONE]\n\n"


def event(content: Mapping[str, Any], *, space: bool = True) -> bytes:
    """One event; TGI's clients were written against `data:` without a space."""
    return f"data:{' ' if space else ''}{compact_json(content)}\n\n".encode()


class EventStreamResponse(Response):
    """Writes `events` as they come. `on_close` is called once, however the stream ends."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        on_close: Callable[[], None],
        keep_alive_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status_code=200, media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        self._events = events
        self._on_close = on_close
        self._keep_alive_s = keep_alive_s
        self._written_s = 0.0  # when the last event was, on the loop's clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            await until_gone(self._write(send), receive)
        finally:
            self._on_close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        clock = asyncio.get_running_loop().time
        self._written_s = clock()
        comments = asyncio.ensure_future(self._comment(send))
        try:
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                self._written_s = clock()
        finally:
            await _ended(comments)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _comment(self, send: Send) -> None:
        """A comment wherever nothing was written for `keep_alive_s`, from a task of its own: to wait for each event
        with a timeout would cost every token a task and a timer."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(self._written_s + self._keep_alive_s - clock())
            if clock() - self._written_s >= self._keep_alive_s:
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                self._written_s = clock()


async def next_or_none(events: AsyncIterator[bytes]) -> bytes | None:
    # A StopAsyncIteration cannot leave a task.
    return await anext(events, None)


async def gone(receive: Receive) -> None:
    """Returns when the client has closed the connection. The request's body must have been read."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return


async def until_gone(work: Awaitable[T], receive: Receive) -> T | None:
    """The result of `work`, or None (and `work` cancelled) if the client goes away before."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        await _ended(task)
        await _ended(watch)


async def _ended(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait for its end, whatever that is; nothing waits for one that has ended."""
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task
