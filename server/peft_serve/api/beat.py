"""The beat: one look at the server twice a second for everybody who watches, and none while nobody does.

Owns the one task that looks and the event that was made last. Lives on the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, Final

from peft_serve.adapters.catalog import Catalog
from peft_serve.adapters.combined import parts_of
from peft_serve.api.live_view import live_view, seen_view
from peft_serve.api.principal import Principal
from peft_serve.api.rates import Counts, RateWindow
from peft_serve.api.service import Service
from peft_serve.api.sse import event
from peft_serve.core import BASE, BASE_SLOT, AdapterId, Row
from peft_serve.engine.snapshot import EngineSnapshot, EngineState
from peft_serve.errors import QueueFull, ServeError

EVERY_S: Final = 0.5
LOOKS: Final = 10
"""At the rows, for each event: a request may be shorter than the time between two, and the fullest step is told."""
MAX_LISTENERS: Final = 64
MAX_METHODS: Final = 4096
RETRY_S: Final = 5.0


class _Run:
    """The events of one time that somebody watches: the last one, and word of the next."""

    def __init__(self) -> None:
        self.view: dict[str, Any] | None = None
        self.content: bytes | None = None  # the view, as those are told who see everything
        self.is_over = False
        self._tick = asyncio.Event()  # set when the next event is there, and then replaced

    def publish(self, view: dict[str, Any], *, is_last: bool) -> None:
        self.view, self.content, self.is_over = view, event(view), is_last
        self._wake()

    def end(self) -> None:
        self.is_over = True
        self._wake()

    async def events(self, principal: Principal) -> AsyncIterator[bytes]:
        """The event made last, and those to come, as far as the principal sees them; a slow listener misses some."""
        seen: bytes | None = None
        while True:
            if self.content is not seen and self.content is not None and self.view is not None:
                seen = self.content
                yield seen if principal.reach.is_everything else event(seen_view(self.view, principal.sees_all_of))
            elif self.is_over:
                return
            else:
                await self._tick.wait()

    def _wake(self) -> None:
        self._tick.set()
        self._tick = asyncio.Event()


class Beat:
    """Each `join`, which gives the events, is answered by one `leave`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._threads = service.store_threads
        self._parts = service.parts
        self._began_s = service.parts.clock()
        self._methods: dict[AdapterId, str | None] = {}
        self._num_listeners = 0
        self._task: asyncio.Task[None] | None = None
        self._run = _Run()
        self._window = RateWindow()

    def join(self, principal: Principal) -> AsyncIterator[bytes]:
        """Somebody begins to watch. Raises `QueueFull` when too many do already."""
        if self._num_listeners >= MAX_LISTENERS:
            raise QueueFull(f"{MAX_LISTENERS} clients watch already; close one, or look later", retry_after_s=RETRY_S)
        self._num_listeners += 1
        if self._task is None or self._task.done():
            self._run, self._window = _Run(), RateWindow()
            self._task = asyncio.get_running_loop().create_task(self._look(self._run))
        return self._run.events(principal)

    def leave(self) -> None:
        """Somebody watches no longer; with the last one the looking ends."""
        self._num_listeners -= 1
        assert self._num_listeners >= 0, "more have left than joined"
        if self._num_listeners == 0 and self._task is not None:
            self._task.cancel()
            self._task = None

    async def _look(self, run: _Run) -> None:
        snapshot = self._parts.engine.snapshot()
        num_steps, num_looks = snapshot.num_steps, 0  # the first event comes at once
        try:
            while not run.is_over:
                rows: tuple[tuple[AdapterId, Row], ...] = ()
                for _ in range(num_looks):
                    await asyncio.sleep(EVERY_S / LOOKS)
                    snapshot = self._parts.engine.snapshot()
                    if snapshot.num_steps != num_steps and len(snapshot.last_rows) >= len(rows):
                        rows = _with_adapters(snapshot)
                    num_steps = snapshot.num_steps
                await self._look_up({adapter for adapter, _ in rows} - self._methods.keys())
                # A server that stops waits for its connections: these end with the last request.
                run.publish(self._view(snapshot, rows), is_last=_is_done(snapshot))
                num_looks = LOOKS
        finally:
            run.end()

    def _view(self, snapshot: EngineSnapshot, rows: tuple[tuple[AdapterId, Row], ...]) -> dict[str, Any]:
        now_s = self._parts.clock()
        totals = self._parts.metrics.totals()
        counts = Counts(
            time_s=now_s,
            drawn_tokens=snapshot.num_drawn_tokens,
            prompt_tokens=snapshot.num_prompt_tokens,
            requests=totals.num_requests,
            steps=totals.num_steps,
            step_s=totals.step_s,
            looked_up=totals.prompt_tokens,
            cached=totals.cached_tokens,
        )
        return live_view(
            snapshot,
            rows,
            self._window.add(counts),
            time_s=now_s - self._began_s,
            name_of=self._service.name_of,
            method_of=self._methods.get,
        )

    async def _look_up(self, adapters: set[AdapterId]) -> None:
        """Learn the methods of adapters that were not seen before."""
        if len(self._methods) > MAX_METHODS:
            self._methods.clear()
        for adapter in adapters:
            name = self._service.name_of(adapter)
            self._methods[adapter] = await self._threads.run(_method_of, self._parts.catalog, adapter, name)


def _with_adapters(snapshot: EngineSnapshot) -> tuple[tuple[AdapterId, Row], ...]:
    """The last step's rows; one whose adapter has left its slot since is not told."""
    seats = {resident.slot: resident.adapter for resident in snapshot.resident} | {BASE_SLOT: BASE}
    return tuple((seats[row.slot], row) for row in snapshot.last_rows if row.slot in seats)


def _method_of(catalog: Catalog, adapter: AdapterId, name: str) -> str | None:
    """The peft type of an adapter, or those of a combination's parts joined by `+`. May read the disk."""
    if adapter == BASE:
        return None
    known: dict[AdapterId, str] = {}
    for part in name.split("+"):
        with suppress(ServeError):
            for version in catalog.versions(part.partition(":")[0].partition("@")[0]):
                if version.summary is not None:
                    known[version.id] = version.summary.peft_type
    methods = [known.get(part.id) for part in parts_of(adapter)]
    return "+".join(method for method in methods if method) if all(methods) else None


def _is_done(snapshot: EngineSnapshot) -> bool:
    is_idle = snapshot.num_running + snapshot.num_waiting == 0
    is_ending = snapshot.state in (EngineState.DRAINING, EngineState.STOPPED)
    return snapshot.state is EngineState.DEAD or (is_ending and is_idle)
