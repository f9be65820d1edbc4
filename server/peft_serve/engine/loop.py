"""The engine: one thread that plans, runs and commits, and the only place where scheduler and model meet.

Owns the thread and its inbox of frozen commands. Slow things (reading and compiling adapters) are asked of the host
cache and come back through the inbox: they begin when a request is submitted, whatever the engine does then, and what
the host has already is in the very next step. Copies on their way to a slot are `host_copies`' business, and how things
stand is written up in `books`. What a step leaves to tell is told while a GPU computes the next one; a CPU's cores are
all busy then, so it is told before. Knows no HTTP, no text and no file.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from peft_serve.adapters.host_cache import HostCache
from peft_serve.adapters.primitives import Adapter
from peft_serve.core import (
    BASE,
    BASE_SLOT,
    AdapterId,
    Event,
    FinishEvent,
    FinishReason,
    Footprint,
    Request,
    RequestId,
    Step,
)
from peft_serve.engine.books import EngineBooks
from peft_serve.engine.commands import Cancel, Command, GiveUp, Load, Loaded, Pin, Stop, Submit, Unload
from peft_serve.engine.host_copies import HostCopies
from peft_serve.engine.outbox import Outbox
from peft_serve.engine.snapshot import EngineSnapshot, EngineState
from peft_serve.engine.stepping import EngineError, Runner, Stepping
from peft_serve.errors import InvalidParameter, QueueFull, ServeError, Unavailable
from peft_serve.metrics import Metrics
from peft_serve.scheduling.forecast import require_time
from peft_serve.scheduling.scheduler import Scheduler

_log = logging.getLogger(__name__)

_IDLE_S = 1.0  # how long an idle engine sleeps before it looks at its books
_RETRY_S = 1.0


class Engine:
    """See the module. Everything public may be called from any thread and returns at once, unless it says so."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        make_runner: Callable[[Callable[[AdapterId], Adapter]], Runner],
        host_cache: HostCache,
        metrics: Metrics,
        clock: Callable[[], float],
        draw_seed: Callable[[], int],
        max_queue: int,
        footprint_of: Callable[[Adapter], Footprint],
        block_size: int,
        on_thread_start: Callable[[], None] = lambda: None,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._scheduler = scheduler
        self._host_cache = host_cache
        self._metrics = metrics
        self._clock = clock
        self._draw_seed = draw_seed
        self._max_queue = max_queue
        self._on_thread_start = on_thread_start
        self._on_stop = on_stop
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._copies = HostCopies(host_cache, scheduler, footprint_of, self._on_loaded)
        self._stepping = Stepping(scheduler, make_runner(self._copies.__getitem__))
        self._outbox = Outbox()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._lock = threading.Lock()
        self._num_arriving = 0  # submitted, not yet seen by the scheduler
        self._state = EngineState.STARTING
        self._books = EngineBooks(scheduler, host_cache, block_size=block_size, clock=clock)
        self._is_overlapped = self._stepping.overlap(self._while_it_computes)
        self._idle = threading.Event()
        self._idle.set()

    def connect(self, deliver: Callable[[Sequence[Event]], None]) -> None:
        """Where events go: called on the engine's thread, once a step."""
        self._outbox.connect(deliver)

    def start(self) -> None:
        self._state = EngineState.RUNNING
        self._books.refresh(self._state)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Admit a request. Raises `Unavailable` unless the engine runs, `QueueFull` and `DeadlineMissed` at once."""
        if self._state is not EngineState.RUNNING:
            way_out = "it must be restarted" if self._state is EngineState.DEAD else "try again shortly"
            raise Unavailable(f"the server is {self._state}; {way_out}", retry_after_s=_RETRY_S)
        if request.deadline_s is not None:  # by what the last step left; the scheduler looks again behind the next
            require_time(self._books.wait_s, request.deadline_s - self._clock())
        with self._lock:
            if (num_waiting := self._num_arriving + self._books.num_waiting) >= self._max_queue:
                raise QueueFull(
                    f"{num_waiting} requests are waiting, as many as this server queues (--max-queue); try again later",
                    retry_after_s=_RETRY_S,
                )
            self._num_arriving += 1
        if request.sampling.seed is None:
            request = replace(request, sampling=replace(request.sampling, seed=self._draw_seed()))
        self._idle.clear()
        self._inbox.put(Submit(request))
        if request.adapter != BASE and not self._books.has_on_device(request.adapter):
            self._host_cache.fetch_ahead(request.adapter)

    def cancel(self, request: RequestId, reason: FinishReason) -> None:
        """End a request; one that has ended already, or never was, is no error."""
        self._inbox.put(Cancel(request, reason))

    def load(self, adapter: AdapterId) -> None:
        """Bring an adapter to the host before anyone asks for it."""
        self._inbox.put(Load(adapter))

    def unload(self, adapter: AdapterId) -> None:
        """Give an adapter's memory back on every tier, as soon as no running request uses it."""
        self._inbox.put(Unload(adapter))

    def set_pinned(self, adapter: AdapterId, *, pinned: bool) -> None:
        """Keep an adapter on the device whatever else wants its place, or no longer."""
        self._inbox.put(Pin(adapter, pinned))

    def snapshot(self) -> EngineSnapshot:
        return self._books.snapshot(self._state)

    def close_admission(self) -> None:
        """Admit nothing more; what was admitted goes on."""
        if self._state is EngineState.RUNNING:
            self._state = EngineState.DRAINING

    def drain(self, timeout_s: float) -> bool:
        """Admit nothing more and wait for what runs; True when everything ended in time. Blocks."""
        self.close_admission()
        return self._idle.wait(timeout_s)

    def give_up(self, reason: str) -> None:
        """Die: admit nothing more, and end every request; what the engine would answer is of no use to anybody."""
        self.close_admission()
        self._inbox.put(GiveUp(reason))

    def cut_short(self) -> None:
        """Admit nothing more, and end what runs with 503. Does not wait."""
        self.close_admission()
        self._inbox.put(Stop())

    def stop(self) -> None:
        """End the thread; requests that still run end as cancelled. Blocks."""
        self._inbox.put(Stop())
        if self._thread.is_alive():
            self._thread.join()
        self._host_cache.close()
        self._on_stop()

    # ---- the engine's own thread ----

    def _main(self) -> None:
        try:
            self._on_thread_start()
            while self._read_inbox():
                self._advance()
            self._state = EngineState.STOPPED
        except Exception:  # noqa: BLE001
            # Whatever this is, no request may hang on it: they all end, and health tells the supervisor.
            _log.exception("the engine has died")
            self._state = EngineState.DEAD
        self._end_all()
        self._idle.set()

    def _read_inbox(self) -> bool:
        """Take in every command; False when told to stop. Sleeps when there is nothing to do."""
        if self._scheduler.has_work:
            return self._hear()
        self._books.refresh(self._state)
        if self._inbox.empty():
            with self._lock:
                if self._num_arriving == 0:
                    self._idle.set()
        return self._hear(timeout_s=_IDLE_S)

    def _hear(self, timeout_s: float = 0.0) -> bool:
        """Obey what is in the inbox, and wait so long for the first of it; False, always from then on: stop."""
        events: list[Event] = []
        try:
            while (command := self._next_command(timeout_s)) is not None and not isinstance(command, Stop):
                events += self._obey(command)
                timeout_s = 0.0
        finally:
            if events:
                self._outbox.tell(events)
        if isinstance(command, Stop):
            self._inbox.put(command)
        return command is None

    def _next_command(self, timeout_s: float) -> Command | None:
        try:
            return self._inbox.get(timeout=timeout_s) if timeout_s else self._inbox.get_nowait()
        except queue.Empty:
            return None

    def _obey(self, command: Command) -> list[Event]:
        match command:
            case Submit(request):
                return self._take_in(request)
            case Cancel(request_id, reason):
                return self._scheduler.cancel(request_id, reason)
            case Loaded(adapter, outcome):
                return self._copies.receive(adapter, outcome)
            case Load(adapter):
                self._copies.warm(adapter)
            case Unload(adapter):
                self._copies.unload(adapter)
            case Pin(adapter, pinned):
                (self._scheduler.pin if pinned else self._scheduler.unpin)(adapter)
            case GiveUp(reason):
                raise EngineError(reason)
            case Stop():
                raise AssertionError("stop is read by the loop itself")
        return []

    def _take_in(self, request: Request) -> list[Event]:
        try:
            self._scheduler.submit(request)
        except ServeError as error:
            return [FinishEvent(request=request.id, reason=FinishReason.FAILED, error=error)]
        except ValueError as error:  # a request that admission should not have let through: it alone fails
            _log.exception("request %s cannot be queued", request.id)
            failure = InvalidParameter(f"the request cannot be run: {error}")
            return [FinishEvent(request=request.id, reason=FinishReason.FAILED, error=failure)]
        finally:
            with self._lock:
                self._num_arriving -= 1
        return []

    def _advance(self) -> None:
        """One step, if there is one to make."""
        began_s = self._clock()
        if self._copies.fetch():
            self._hear()  # what the host had at hand runs in this step, and not in the next
        step = self._scheduler.plan()
        self._copies.fetch()
        if step is None:
            self._copies.release_unclaimed()
            self._outbox.tell()
            self._books.refresh(self._state)
            if events := self._scheduler.take_events():
                self._outbox.tell(events)
            elif self._scheduler.has_work:
                self._hear(timeout_s=_IDLE_S)  # nothing can run before news: of an adapter's load, as a rule
            return
        self._books.begin(began_s)
        events = self._stepping.run(step)
        self._outbox.require_told()
        self._books.end(step)
        self._copies.release_unclaimed()
        self._copies.unload_idle()
        self._outbox.hold(events)
        if not (self._is_overlapped and self._scheduler.has_work):
            self._books.refresh(self._state)
            self._outbox.tell()
        _tell_of(step, self._clock() - began_s, self._scheduler, self._metrics)
        self._stepping.require_working()

    def _while_it_computes(self) -> None:
        """What the last step left to be done, and the one under way does not need."""
        self._books.refresh(self._state)
        self._outbox.tell_within_a_step()

    def _on_loaded(self, adapter: AdapterId, outcome: Adapter | Exception) -> None:
        """Called on the host cache's thread."""
        self._inbox.put(Loaded(adapter, outcome))

    def _end_all(self) -> None:
        error = Unavailable("the server stopped before the request was complete", retry_after_s=_RETRY_S)
        events: list[Event] = []
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                break
            if isinstance(command, Submit):
                events.append(FinishEvent(request=command.request.id, reason=FinishReason.FAILED, error=error))
        events += [
            FinishEvent(request=request, reason=FinishReason.FAILED, error=error)
            for request in self._scheduler.open_requests()
        ]
        self._outbox.tell(events)


def _tell_of(step: Step, seconds: float, scheduler: Scheduler, metrics: Metrics) -> None:
    """What the step took, to those who learn from it and those who watch."""
    scheduler.note_time(seconds)
    slots = {row.slot for row in step.rows} - {BASE_SLOT}
    metrics.observe_step(seconds=seconds, num_rows=len(step.rows), num_tokens=step.num_tokens, num_adapters=len(slots))
    if step.removes:
        metrics.observe_evictions("device", len(step.removes))
