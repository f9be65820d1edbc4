"""Replicas in this process: scripted ones, and real ones whose every word is pickled on its way."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry

from peft_serve.adapters.records import CheckpointFiles
from peft_serve.cluster.board import Board
from peft_serve.cluster.figures import PlacingFigures
from peft_serve.cluster.remote_engine import Bounds, RemoteEngine
from peft_serve.cluster.replicas import Homes, ReplicaLost
from peft_serve.cluster.specs import SpecWriter
from peft_serve.cluster.wire import Accepted, Ask, BaseFacts, Found, Item, Report, Told, packed
from peft_serve.core import AdapterId, Event, FinishEvent, FinishReason, Request, RequestId, TokenEvent
from peft_serve.engine.snapshot import EngineSnapshot, EngineState

BASE_CHECK = "1.0 abc"


def carried(value: Any) -> Any:
    """As another process has it."""
    return pickle.loads(pickle.dumps(value))


def request(name: str = "r", adapter: str = "base", **changes: Any) -> Request:
    return Request(id=RequestId(name), adapter=AdapterId(adapter), prompt=(1, 2, 3), **changes)


def token(index: int, name: str = "r") -> TokenEvent:
    return TokenEvent(request=RequestId(name), index=index, token=index + 10)


def finish(name: str = "r", error: Exception | None = None) -> FinishEvent:
    reason = FinishReason.FAILED if error is not None else FinishReason.LENGTH
    return FinishEvent(request=RequestId(name), reason=reason, error=error, num_cached_tokens=2)


def report(replica: str, checked_for: str = BASE_CHECK, **changes: Any) -> Report:
    snapshot = EngineSnapshot(**{"state": EngineState.RUNNING, "num_slots": 4, "block_size": 16, **changes})
    return Report(replica=replica, checked_for=checked_for, snapshot=snapshot, num_open=0)


Act = Item | Exception | asyncio.Event
"""What a call does next: gives an item, fails, or waits until it is told to go on."""


@dataclass(eq=False)
class ScriptedCall:
    acts: Sequence[Act]
    is_cancelled: bool = False

    async def items(self) -> AsyncIterator[Item]:
        for act in self.acts:
            if isinstance(act, asyncio.Event):
                await act.wait()
            elif isinstance(act, Exception):
                raise act
            else:
                yield carried(act)

    def cancel(self) -> None:
        self.is_cancelled = True


@dataclass(eq=False)
class ScriptedReplicas:
    """Every call does what the next script says."""

    scripts: list[Sequence[Act]] = field(default_factory=list)
    calls: list[ScriptedCall] = field(default_factory=list)
    asks: list[Ask] = field(default_factory=list)
    avoided: list[str | None] = field(default_factory=list)
    orders: list[tuple[Any, ...]] = field(default_factory=list)
    told: list[Report] = field(default_factory=lambda: [report("one"), report("two")])
    is_silent: bool = False

    def generate(self, ask: Ask, avoided: str | None) -> ScriptedCall:
        self.asks.append(carried(ask))
        self.avoided.append(avoided)
        call = ScriptedCall(self.scripts.pop(0))
        self.calls.append(call)
        return call

    async def stop(self, replica: str, request: RequestId, reason: FinishReason) -> None:
        self.orders.append(("stop", replica, request, reason))

    async def load(self, adapter: AdapterId, homes: Homes) -> None:
        self.orders.append(("load", adapter, dict(homes)))

    async def unload(self, adapter: AdapterId) -> None:
        self.orders.append(("unload", adapter))

    async def set_pinned(self, adapter: AdapterId, *, pinned: bool) -> None:
        self.orders.append(("pin" if pinned else "unpin", adapter))

    async def reports(self, front: str, sent_s: float) -> Sequence[Report]:
        if self.is_silent:
            raise ReplicaLost("they do not answer")
        return [carried(each) for each in self.told]

    async def facts(self) -> BaseFacts:
        raise AssertionError("a front that runs has its facts")

    async def all_facts(self) -> Sequence[BaseFacts]:
        raise AssertionError("a front that runs has its facts")

    async def inspect(self, files: CheckpointFiles) -> Found | Told:
        raise AssertionError("no upload here")


@dataclass(eq=False)
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


async def engine_over(
    replicas: Any,
    *,
    bounds: Bounds | None = None,
    clock: Callable[[], float] | None = None,
    registry: CollectorRegistry | None = None,
) -> tuple[RemoteEngine, list[Event]]:
    """A front's engine that has looked around once, and the events it delivers."""
    events: list[Event] = []
    engine = RemoteEngine(
        replicas,
        Board(BASE_CHECK),
        SpecWriter(lambda tokens: tokens),
        front="front",
        bounds=bounds or Bounds(max_ongoing=2, max_queue=1),
        clock=clock or Clock(),
        loop=asyncio.get_running_loop(),
        draw_seed=lambda: 7,
        figures=PlacingFigures(registry or CollectorRegistry()),
    )
    engine.connect(events.extend)
    await engine.look()
    return engine, events


async def settled(engine: RemoteEngine) -> None:
    """Every request has ended."""
    async with asyncio.timeout(5):
        while engine.num_open:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)


def answer(*steps: Sequence[Event], replica: str = "one") -> list[Act]:
    return [Accepted(replica=replica), *(packed(step) for step in steps)]
