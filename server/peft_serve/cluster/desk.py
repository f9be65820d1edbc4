"""The engine's events on a replica, by request and step, for whoever waits for them on the event loop.

Owns one queue for each open request. What a step gave a request is one item, so that one message carries it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType

from peft_serve.core import Event, FinishEvent, FinishReason, Request, RequestId
from peft_serve.engine.client import EngineThread


class Desk:
    """Must be made and used on the event loop's thread."""

    def __init__(self, engine: EngineThread, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop
        self._queues: dict[RequestId, asyncio.Queue[tuple[Event, ...]]] = {}
        engine.connect(self._deliver)

    @property
    def num_open(self) -> int:
        return len(self._queues)

    def submit(self, request: Request) -> Events:
        """Raises what the engine refuses a request with; the caller closes what it is given."""
        queue = self._queues[request.id] = asyncio.Queue()
        try:
            self._engine.submit(request)
        except BaseException:
            del self._queues[request.id]
            raise
        return Events(queue, lambda: self._close(request.id))

    def _close(self, request: RequestId) -> None:
        if self._queues.pop(request, None) is not None:
            self._engine.cancel(request, FinishReason.CANCELLED)

    def _deliver(self, events: Sequence[Event]) -> None:
        """Called on the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hand_out, tuple(events))

    def _hand_out(self, events: tuple[Event, ...]) -> None:
        by_request: dict[RequestId, list[Event]] = {}
        for event in events:
            by_request.setdefault(event.request, []).append(event)
        for request, its in by_request.items():
            queue = self._queues.get(request)
            if queue is not None:
                queue.put_nowait(tuple(its))
                if isinstance(its[-1], FinishEvent):
                    del self._queues[request]


class Events:
    """What comes of one request, a tuple for each step. Closed early, the request is cancelled."""

    def __init__(self, queue: asyncio.Queue[tuple[Event, ...]], close: Callable[[], None]) -> None:
        self._queue = queue
        self._close = close

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    async def next(self) -> tuple[Event, ...]:
        """What came since, at least one event; the last of all is a `FinishEvent`."""
        events = await self._queue.get()
        while not self._queue.empty():
            events += self._queue.get_nowait()
        return events
