"""The engine as the front has it: every request is a call to a replica, and its events come back as the engine's do.

Owns one task for each open request, and the bound on their number: what one more would exceed is refused at once. A
call whose replica is lost is made once more, elsewhere. Of one that had begun to answer, the same tokens have to come
again, as they do where a row's bits do not depend on its batch; they are not delivered twice. Where others come, or the
second replica is lost too, its stream ends with an error that says so. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from peft_serve.cluster.board import Board
from peft_serve.cluster.counting import counted
from peft_serve.cluster.figures import PlacingFigures
from peft_serve.cluster.replicas import Call, Homes, ReplicaLost, Replicas
from peft_serve.cluster.specs import SpecWriter
from peft_serve.cluster.wire import Accepted, Ask, unpacked
from peft_serve.core import AdapterId, Event, FinishEvent, FinishReason, Request, RequestId, TokenEvent
from peft_serve.engine.snapshot import EngineSnapshot, EngineState
from peft_serve.errors import AdapterUnavailable, DeadlineMissed, Internal, QueueFull, ServeError, Unavailable
from peft_serve.scheduling.forecast import require_time

_log = logging.getLogger(__name__)

REPORT_S: Final = 0.5
"""Between two looks at how the replicas are."""

_NUM_ATTEMPTS: Final = 2
_RETRY_S: Final = 1.0
_NOT_PLACED: Final = "no replica was free in the time that the request was to wait; allow it more, or try again later"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How many requests there may be."""

    max_ongoing: int  # at each replica
    max_queue: int  # beyond what all replicas take: these wait for one


@dataclass(slots=True, eq=False)
class _Open:
    """A request that has not ended."""

    request: Request
    name: RequestId  # as its replica knows it
    call: Call | None = None
    replica: str | None = None  # that has it, or had
    delivered: list[Event] = field(default_factory=list)
    stop: FinishReason | None = None  # it is to end; its last event is waited for


class RemoteEngine:
    """An `engine.client.EngineThread`; `submit` and `cancel` are the event loop's, the rest anybody's."""

    def __init__(
        self,
        replicas: Replicas,
        board: Board,
        specs: SpecWriter,
        *,
        front: str,
        bounds: Bounds,
        clock: Callable[[], float],
        loop: asyncio.AbstractEventLoop,
        draw_seed: Callable[[], int],
        figures: PlacingFigures,
        homes_of: Callable[[AdapterId], Homes] = lambda _: {},
    ) -> None:
        """`front` is this front's own name; `draw_seed` gives seeds to requests without; `homes_of` tells where an
        adapter's parts lie in read-only folders."""
        self._replicas = replicas
        self._board = board
        self._specs = specs
        self._front = front
        self._bounds = bounds
        self._clock = clock
        self._loop = loop
        self._draw_seed = draw_seed
        self._figures = figures
        self.homes_of = homes_of
        self._deliver: Callable[[Sequence[Event]], None] = lambda _events: None
        self._open: dict[RequestId, _Open] = {}
        self._tasks: dict[RequestId, asyncio.Task[None]] = {}
        self._errands: set[asyncio.Task[None]] = set()
        self._pins: frozenset[AdapterId] = frozenset()
        self._is_draining = False

    # what an engine is asked

    def connect(self, deliver: Callable[[Sequence[Event]], None]) -> None:
        """Where events go: called on the event loop."""
        self._deliver = deliver

    def submit(self, request: Request) -> None:
        """Begin a request. Raises Unavailable, QueueFull and DeadlineMissed at once."""
        seen = self.snapshot()
        if self._is_draining:
            raise Unavailable("the server is stopping; try again shortly", retry_after_s=_RETRY_S)
        if seen.state is not EngineState.RUNNING:
            raise Unavailable("no replica of the engine is ready; try again shortly", retry_after_s=_RETRY_S)
        if request.deadline_s is not None:
            require_time(seen.wait_s, request.deadline_s - self._clock())
        most = self._board.num_running * self._bounds.max_ongoing + self._bounds.max_queue
        if len(self._open) >= most:
            raise QueueFull(
                f"all {most} requests are under way that {counted(self._board.num_running, 'replica')} and the queue "
                "have room for (--max-ongoing, --max-queue); try again later",
                retry_after_s=_RETRY_S,
            )
        if request.sampling.seed is None:  # drawn here, so that a second replica draws the same tokens
            request = replace(request, sampling=replace(request.sampling, seed=self._draw_seed()))
        self._open[request.id] = one = _Open(request=request, name=request.id)
        self._tasks[request.id] = self._loop.create_task(self._run(one))

    def cancel(self, request: RequestId, reason: FinishReason) -> None:
        """End a request; one that has ended already, or never was, is no error."""
        one = self._open.get(request)
        if one is None:
            return
        if reason is FinishReason.CANCELLED:
            self._tasks[request].cancel()
            return
        one.stop = reason
        self._pass_on_stop(one)

    def load(self, adapter: AdapterId) -> None:
        """Bring an adapter to the host of the replica that it belongs to."""
        self._send(lambda: self._replicas.load(adapter, self.homes_of(adapter)))

    def unload(self, adapter: AdapterId) -> None:
        """Have every replica give an adapter's memory back."""
        self._send(lambda: self._replicas.unload(adapter))

    def set_pinned(self, adapter: AdapterId, *, pinned: bool) -> None:
        """Keep an adapter on every replica's device, or no longer; replicas that come later are told too."""
        self._pins = self._pins | {adapter} if pinned else self._pins - {adapter}
        self._send(lambda: self._replicas.set_pinned(adapter, pinned=pinned))

    def snapshot(self) -> EngineSnapshot:
        """As all replicas last told, with what waits here."""
        num_unplaced = sum(one.replica is None for one in tuple(self._open.values()))
        seen = self._board.snapshot(num_unplaced=num_unplaced, pinned=self._pins)
        return replace(seen, state=EngineState.DRAINING) if self._is_draining else seen

    def close_admission(self) -> None:
        """Take no more requests; those that are open go on."""
        self._is_draining = True

    # what the front does with it

    @property
    def num_open(self) -> int:
        """Requests whose last event has not come."""
        return len(self._open)

    @property
    def has_only_strangers(self) -> bool:
        """Whether all replicas that answer are of another base, version or limits than this front."""
        return self._board.num_strangers > 0 and self._board.num_running == 0

    async def look(self) -> None:
        """Ask the replicas how they are, and tell new ones what is pinned. Where one does not answer in time, what is
        known of all stands: Serve finds out whether it is to be replaced."""
        reports = await self._replicas.reports(self._front, self._clock())
        is_news = self._board.take(reports)
        self._figures.set_replicas(self._board.running)
        if is_news:
            for adapter in self._pins:
                await self._errand(self._replicas.set_pinned(adapter, pinned=True))

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(REPORT_S)
            await self._errand(self.look())

    # a request

    async def _run(self, one: _Open) -> None:
        request = one.request.id
        try:
            error = await self._answered(one)
        except asyncio.CancelledError:
            if one.call is not None:
                one.call.cancel()
            raise
        finally:
            del self._open[request]
            del self._tasks[request]
        if error is not None:
            self._deliver([FinishEvent(request=request, reason=FinishReason.FAILED, error=error)])

    async def _answered(self, one: _Open) -> ServeError | None:
        """What the request failed with, if that was not the replica's to tell."""
        for attempt in range(_NUM_ATTEMPTS):
            try:
                await self._attempt(one, attempt)
            except ReplicaLost as lost:
                _log.warning("request %s lost its replica %s: %s", one.request.id, one.replica or "", lost)
                if one.stop is not None:
                    self._deliver([FinishEvent(request=one.request.id, reason=one.stop)])
                    return None
            except _OtherTokens:
                break
            except ServeError as error:
                return error
            except Exception:  # noqa: BLE001  # whatever it is, its caller is not to hang on it
                _log.exception("request %s failed", one.request.id)
                return Internal("the request failed on the server's side; others were not affected")
            else:
                return None
        what = "the answer is not complete" if one.delivered else "the request was not answered"
        return Unavailable(f"the replica that had the request was lost, and {what}; try again", retry_after_s=_RETRY_S)

    async def _attempt(self, one: _Open, attempt: int) -> None:
        ask = self._ask(one.request, attempt)
        avoided, one.replica, one.name = one.replica, None, ask.request.id
        one.call = call = self._replicas.generate(ask, avoided)
        items = call.items()
        deadline_s = one.request.deadline_s
        try:
            async with asyncio.timeout(None if deadline_s is None else max(0.0, deadline_s - self._clock())):
                first = await anext(items, None)
        except TimeoutError:
            call.cancel()
            raise DeadlineMissed(_NOT_PLACED, retry_after_s=_RETRY_S) from None
        if not isinstance(first, Accepted):
            raise ReplicaLost("it gave no sign")
        one.replica = first.replica
        if not one.request.is_trial:
            self._figures.observe(one.request.adapter, first.replica, is_again=attempt > 0)
        self._pass_on_stop(one)
        known = list(one.delivered)[::-1]
        async for item in items:
            assert not isinstance(item, Accepted), "a request is accepted once"
            events = unpacked(item)
            last = events[-1]
            if isinstance(last, FinishEvent) and _is_of_its_engine(last.error):
                raise ReplicaLost(str(last.error))
            if attempt:
                events = _unknown([replace(event, request=one.request.id) for event in events], known)
            one.delivered += events
            if events:
                self._deliver(events)
            if isinstance(last, FinishEvent):
                return
        raise ReplicaLost("its answer broke off")

    def _ask(self, request: Request, attempt: int) -> Ask:
        spec = self._specs.spec_of(request.constraint)
        name = RequestId(f"{request.id}~{attempt}") if attempt else request.id  # the first may still run somewhere
        if self._open[request.id].delivered:
            request = replace(request, deadline_s=None)  # it was met
        return Ask(
            front=self._front,
            sent_s=self._clock(),
            request=replace(request, id=name, constraint=None),
            spec=spec,
            homes=self.homes_of(request.adapter),
        )

    def _pass_on_stop(self, one: _Open) -> None:
        if one.stop is not None and one.replica is not None:
            self._begin(self._replicas.stop(one.replica, one.name, one.stop))

    # errands: what nobody waits for

    def _send(self, errand: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(lambda: self._begin(errand()))

    def _begin(self, errand: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(self._errand(errand))
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    async def _errand(self, errand: Coroutine[Any, Any, None]) -> None:
        try:
            await errand
        except ReplicaLost as lost:
            _log.warning("the replicas could not be told: %s", lost)
        except Exception:  # noqa: BLE001  # nobody waits for it, and the next look must come
            _log.exception("the replicas could not be told")


class _OtherTokens(Exception):  # noqa: N818  named as an outcome
    """What comes again is not what came before."""


def _unknown(events: Sequence[Event], known: list[Event]) -> tuple[Event, ...]:
    """The events beyond those that were delivered: `known`, the last of them first, of which those met are taken."""
    fresh: list[Event] = []
    for event in events:
        if not known:
            fresh.append(event)
        elif not _is_same(event, known.pop()):
            raise _OtherTokens
    return tuple(fresh)


def _is_same(event: Event, before: Event) -> bool:
    if isinstance(event, TokenEvent) and isinstance(before, TokenEvent):
        return (event.index, event.token) == (before.index, before.token)
    return type(event) is type(before) and not isinstance(event, FinishEvent)


def _is_of_its_engine(error: Exception | None) -> bool:
    """Whether a request failed because the engine that had it ends or is dead."""
    return isinstance(error, Unavailable) and not isinstance(error, AdapterUnavailable)
