"""The beat: one snapshot of the server twice a second for everybody who watches, and none while nobody does.

Owns the one task that looks, and the content that was made last. Lives on the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Final

from peft_serve.adapters.combined import parts_of
from peft_serve.api.live_view import live_view
from peft_serve.api.rates import Counts, RateWindow
from peft_serve.api.service import Service
from peft_serve.api.sse import event
from peft_serve.core import BASE, AdapterId, Row
from peft_serve.engine.snapshot import EngineSnapshot, EngineState
from peft_serve.errors import QueueFull, ServeError

EVERY_S: Final = 0.5
LOOKS: Final = 10  # at the rows of the step, for each event: a request can be shorter than the time between two
MAX_LISTENERS: Final = 64
_MAX_METHODS: Final = 4096
_RETRY_S: Final = 5.0


class Beat:
    """`listen` is called when somebody begins to watch; the listener closes itself."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._parts = service.parts
        self._began_s = service.parts.clock()
        self._window = RateWindow()
        self._methods: dict[AdapterId, str | None] = {}
        self._num_listeners = 0
        self._task: asyncio.Task[None] | None = None
        self._tick = asyncio.Event()  # set when the next event is there, and then another one
        self._content = b""
        self._is_over = False

    def listen(self) -> Listener:
        """Raises `QueueFull` when too many watch already."""
        if self._num_listeners >= MAX_LISTENERS:
            raise QueueFull(f"{MAX_LISTENERS} clients watch already; close one, or look later", retry_after_s=_RETRY_S)
        self._num_listeners += 1
        if self._task is None or self._task.done():
            self._window = RateWindow()
            self._is_over = False
            self._task = asyncio.get_running_loop().create_task(self._run())
        return Listener(self)

    async def next_content(self) -> bytes | None:
        """The next event; None when there will be no more."""
        if self._is_over:
            return None
        await self._tick.wait()
        return self._content

    def leave(self) -> None:
        """A listener has gone; with the last one the looking ends."""
        self._num_listeners -= 1
        if self._num_listeners == 0 and self._task is not None:
            self._task.cancel()
            self._task = None

    async def _run(self) -> None:
        num_steps, rows = -1, ()
        while not self._is_over:
            snapshot = self._parts.engine.snapshot()
            rows = snapshot.last_rows if snapshot.num_steps != num_steps or snapshot.last_rows else ()
            num_steps = snapshot.num_steps
            await self._learn_methods(snapshot, rows)
            # A server that stops waits for its connections: they end with the last request.
            self._is_over = _is_done(snapshot)
            self._content = event(self._view(snapshot, rows))
            self._tick.set()
            self._tick = asyncio.Event()
            await self._fullest(EVERY_S)

    async def _fullest(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def _view(self, snapshot: EngineSnapshot, rows: tuple[Row, ...]) -> dict[str, object]:
        now_s = self._parts.clock()
        totals = self._parts.metrics.totals()
        rates = self._window.add(
            Counts(
                time_s=now_s,
                drawn_tokens=snapshot.num_drawn_tokens,
                prompt_tokens=snapshot.num_prompt_tokens,
                requests=totals.num_requests,
                steps=totals.num_steps,
                step_s=totals.step_s,
                looked_up=totals.prompt_tokens,
                cached=totals.cached_tokens,
            )
        )
        return live_view(
            snapshot,
            rows,
            rates,
            time_s=now_s - self._began_s,
            name_of=self._service.name_of,
            method_of=self._methods.get,
        )
