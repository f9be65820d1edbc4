"""One replica of the engine: base, adapters and engine of a single server, without its HTTP.

Answers the front's calls, tells routers and the front how it is, and says by its health when it has to be replaced.
Knows no ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Final, Protocol

from peft_serve.adapters.records import CheckpointFiles
from peft_serve.api.operations import MAX_STALL_S
from peft_serve.cluster.clocks import FarClock
from peft_serve.cluster.desk import Desk
from peft_serve.cluster.fitting import mark_of
from peft_serve.cluster.replicas import Homes
from peft_serve.cluster.routes import key_of
from peft_serve.cluster.specs import SpecReader
from peft_serve.cluster.wire import Accepted, Ask, BaseFacts, Found, Item, Report, Told, packed, tell
from peft_serve.core import AdapterId, FinishEvent, FinishReason, Request, RequestId
from peft_serve.engine.client import EngineThread
from peft_serve.engine.parts import ServerParts
from peft_serve.engine.snapshot import EngineState
from peft_serve.engine.watch import BaseWatch
from peft_serve.errors import ServeError

_log = logging.getLogger(__name__)

MAX_FRONTS: Final = 64
MOST_TOLD: Final = 2048
"""Adapters of a tier that routers are told of, those used last where there are more."""

_WATCH_S: Final = 300.0  # between two readings of the base's weights, which cost a read of all of them
_CHANGED: Final = "the base's weights have changed"


class Unhealthy(Exception):  # noqa: N818  named as an outcome
    """The replica is to be replaced."""


class ReplicaEngine(EngineThread, Protocol):
    """What a replica needs of its engine beside what a client does."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def give_up(self, reason: str) -> None: ...

    def cut_short(self) -> None: ...


class Replica:
    """Made on the event loop that serves it. `name` is its own, as routers know it."""

    def __init__(self, parts: ServerParts, engine: ReplicaEngine, *, name: str, max_ongoing: int) -> None:
        self._parts = parts
        self._engine = engine
        self._name = name
        self._max_ongoing = max_ongoing
        self._desk = Desk(engine, asyncio.get_running_loop())
        self._specs = SpecReader()
        self._clocks: OrderedDict[str, FarClock] = OrderedDict()
        self._watch = BaseWatch(parts.check_base, lambda: engine.give_up(_CHANGED), parts.metrics, interval_s=_WATCH_S)

    def start(self) -> None:
        self._engine.start()
        self._watch.start()

    def close(self) -> None:
        """End what runs, with an error in its stream. Blocks."""
        self._engine.cut_short()
        self._watch.stop()
        self._engine.stop()

    # what is asked of it

    async def generate(self, ask: Ask) -> AsyncIterator[Item]:
        """A request's events; closed early, the request is cancelled."""
        self._expect(ask.homes)
        yield Accepted(replica=self._name)
        try:
            events = self._desk.submit(await self._request(ask))
        except ServeError as error:
            yield packed([FinishEvent(request=ask.request.id, reason=FinishReason.FAILED, error=error)])
            return
        with events:
            while True:
                its = await events.next()
                yield packed(its)
                if isinstance(its[-1], FinishEvent):
                    return

    def stop(self, request: RequestId, reason: FinishReason) -> None:
        """End a request; its last event still comes."""
        self._engine.cancel(request, reason)

    def load(self, adapter: AdapterId, homes: Homes) -> None:
        self._expect(homes)
        self._engine.load(adapter)

    def unload(self, adapter: AdapterId) -> None:
        self._engine.unload(adapter)

    def set_pinned(self, adapter: AdapterId, *, pinned: bool) -> None:
        self._engine.set_pinned(adapter, pinned=pinned)

    async def inspect(self, files: CheckpointFiles) -> Found | Told:
        """What the gate says of a checkpoint; takes as long as compiling it does."""
        try:
            found = await asyncio.to_thread(self._parts.inspect, files)
        except ServeError as error:
            return tell(error)
        return Found(
            id=found.id,
            summary=found.summary,
            profile=found.profile,
            cues=found.cues,
            vocabulary=found.vocabulary,
        )

    # what it tells

    def facts(self) -> BaseFacts:
        mark = mark_of(self._parts.settings)
        return BaseFacts(card=self._parts.base, checked_for=self._parts.checked_for, mark=mark)

    def report(self, front: str, sent_s: float) -> Report:
        """How it is, for the front of this name whose clock says `sent_s`."""
        self._clock_of(front).note(sent_s)
        return Report(
            replica=self._name,
            checked_for=self._parts.checked_for,
            snapshot=replace(self._engine.snapshot(), last_rows=()),
            num_open=self._desk.num_open,
        )

    def routing_stats(self) -> dict[str, Any]:
        """How it is, for routers: plain values, adapters by their keys."""
        now = self._engine.snapshot()
        is_open = now.state is EngineState.RUNNING and now.stalled_s <= MAX_STALL_S
        return {
            "num_ongoing": self._desk.num_open,
            "max_ongoing": self._max_ongoing if is_open else 0,
            "max_running": self._parts.settings.max_rows,
            "resident": [key_of(each.adapter) for each in now.resident[-MOST_TOLD:]],
            "on_host": [key_of(each) for each in now.host_adapters[-MOST_TOLD:]],
            "wait_s": now.wait_s,
        }

    def check_health(self) -> None:
        """Raise Unhealthy where only another process can serve again."""
        now = self._engine.snapshot()
        if now.state in (EngineState.DEAD, EngineState.STOPPED):
            raise Unhealthy(f"the engine is {now.state.value}")
        if now.stalled_s > MAX_STALL_S:
            raise Unhealthy(f"the engine has been in one step for {now.stalled_s:.0f} s")

    # its own

    async def _request(self, ask: Ask) -> Request:
        clock, request = self._clock_of(ask.front), ask.request
        clock.note(ask.sent_s)
        deadline_s = request.deadline_s
        return replace(
            request,
            arrival_s=clock.here(request.arrival_s),
            deadline_s=None if deadline_s is None else clock.here(deadline_s),
            constraint=None if ask.spec is None else await self._specs.constraint_of(ask.spec),
        )

    def _clock_of(self, front: str) -> FarClock:
        clock = self._clocks.pop(front, None) or FarClock(self._parts.clock)
        self._clocks[front] = clock
        while len(self._clocks) > MAX_FRONTS:
            self._clocks.popitem(last=False)
        return clock

    def _expect(self, homes: Homes) -> None:
        for adapter, name in homes.items():
            self._parts.catalog.expect_in_folder(adapter, name)
