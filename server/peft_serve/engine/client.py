"""The engine as asyncio code sees it: submit a request, iterate over its events, walk away at any time.

Owns one queue of events per open request. The events of a whole step cross from the engine's thread in one call, and
are handed out in lots, of `AT_ONCE` at most and fewer where they take long: between two lots the event loop turns, so
that what else is due on it waits for one lot's work and not for the step's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from peft_serve.core import AdapterId, Event, FinishEvent, FinishReason, Request, RequestId
from peft_serve.engine.lots import Lot
from peft_serve.engine.snapshot import EngineSnapshot

AT_ONCE: Final = 32
"""Events handed out in one turn of the loop at most. Each wakes a stream, whose work is some tens of microseconds."""


class EngineThread(Protocol):
    """What the client needs of the engine; every call is safe from any thread and returns at once."""

    def connect(self, deliver: Callable[[Sequence[Event]], None]) -> None: ...

    def submit(self, request: Request) -> None:
        """Raises `QueueFull` or `Unavailable`."""
        ...

    def cancel(self, request: RequestId, reason: FinishReason) -> None: ...

    def load(self, adapter: AdapterId) -> None:
        """Bring an adapter to the host before anyone asks for it."""
        ...

    def unload(self, adapter: AdapterId) -> None:
        """Give its memory back on every tier as soon as nobody uses it."""
        ...

    def set_pinned(self, adapter: AdapterId, *, pinned: bool) -> None: ...

    def snapshot(self) -> EngineSnapshot: ...


class EventStream:
    """The events of one request, ending after its `FinishEvent`. `close()` early cancels the request."""

    def __init__(self, request: RequestId, cancel: Callable[[RequestId], None]) -> None:
        self._request = request
        self._cancel = cancel
        self._events: deque[Event] = deque()
        self._news: asyncio.Future[None] | None = None  # what the one reader waits for
        self._is_finished = False
        self._is_closed = False

    def put(self, event: Event) -> None:
        self._events.append(event)
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        if self._is_finished or self._is_closed:
            raise StopAsyncIteration
        while not self._events:
            self._news = asyncio.get_running_loop().create_future()
            try:
                await self._news
            finally:
                self._news = None
        event = self._events.popleft()
        self._is_finished = isinstance(event, FinishEvent)
        return event

    def close(self) -> None:
        """Idempotent; a request that has not ended is cancelled and its row is free within one step."""
        if self._is_closed:
            return
        self._is_closed = True
        self._cancel(self._request)


class EngineClient:
    """Must be made and used on the event loop's thread."""

    def __init__(self, engine: EngineThread, loop: asyncio.AbstractEventLoop) -> None:
        self.engine = engine
        self._loop = loop
        self._streams: dict[RequestId, EventStream] = {}
        self._arrived: deque[Event] = deque()  # and not handed out yet
        self._lot = Lot(loop.time, most=AT_ONCE)
        engine.connect(self._deliver)

    @property
    def num_open(self) -> int:
        """Requests whose last event has not come yet."""
        return len(self._streams)

    def submit(self, request: Request) -> EventStream:
        """Admit a request now; raises `QueueFull` or `Unavailable`. The caller closes the stream."""
        stream = EventStream(request.id, self._forget)
        self._streams[request.id] = stream
        try:
            self.engine.submit(request)
        except BaseException:
            del self._streams[request.id]
            raise
        return stream

    def stop(self, request: RequestId, reason: FinishReason) -> None:
        """End a request early, for a stop string found in its text; its `FinishEvent` still comes."""
        self.engine.cancel(request, reason)

    def _forget(self, request: RequestId) -> None:
        if self._streams.pop(request, None) is not None:
            self.engine.cancel(request, FinishReason.CANCELLED)

    def _deliver(self, events: Sequence[Event]) -> None:
        """Called on the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._take_in, tuple(events))

    def _take_in(self, events: tuple[Event, ...]) -> None:
        is_under_way = bool(self._arrived)
        self._arrived.extend(events)
        if not is_under_way:
            self._hand_out()

    def _hand_out(self) -> None:
        self._lot.turn()
        for _ in range(min(self._lot.size, len(self._arrived))):
            event = self._arrived.popleft()
            stream = self._streams.get(event.request)
            if stream is None:
                continue
            stream.put(event)
            if isinstance(event, FinishEvent):
                del self._streams[event.request]
        if self._arrived:
            self._loop.call_soon(self._hand_out)
        else:
            self._lot.rest()
