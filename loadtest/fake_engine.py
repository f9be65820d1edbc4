"""An engine without a model: it gives every running request a token at a set pace, and computes nothing.

What is left of a server around it is its HTTP side. It runs on a thread of its own and hands over the events of a
step in one call, as the real engine does.
"""

import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice

from peft_serve.core import AdapterId, Event, FinishEvent, FinishReason, Request, RequestId, TokenEvent
from peft_serve.engine.snapshot import EngineSnapshot, EngineState


class FakeEngine:
    """An `EngineThread`. The first `max_rows` requests run, the others wait; a step takes `step_s` at least."""

    def __init__(self, tokens: Sequence[int], *, step_s: float, max_rows: int) -> None:
        """Answers repeat `tokens`, which must not be empty."""
        self._tokens = tuple(tokens)
        self._step_s = step_s
        self._max_rows = max_rows
        self._deliver: Callable[[Sequence[Event]], None] = lambda _: None
        self._live: dict[RequestId, tuple[Request, int]] = {}
        self._ends: list[FinishEvent] = []
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._main, name="fake-engine", daemon=True)
        self._is_stopped = False

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        with self._news:
            self._is_stopped = True
            self._news.notify()
        self._thread.join()

    def connect(self, deliver: Callable[[Sequence[Event]], None]) -> None:
        """Where events go."""
        self._deliver = deliver

    def submit(self, request: Request) -> None:
        """Admit a request."""
        with self._news:
            self._live[request.id] = (request, 0)
            self._news.notify()

    def cancel(self, request: RequestId, reason: FinishReason) -> None:
        """End a request; its `FinishEvent` comes with the next step."""
        with self._news:
            if self._live.pop(request, None) is not None:
                self._ends.append(FinishEvent(request=request, reason=reason))
                self._news.notify()

    def load(self, adapter: AdapterId) -> None:
        """Nothing is loaded."""

    def unload(self, adapter: AdapterId) -> None:
        """Nothing was loaded."""

    def set_pinned(self, adapter: AdapterId, *, pinned: bool) -> None:
        """Nothing is resident."""

    def snapshot(self) -> EngineSnapshot:
        """What runs and waits."""
        num_live = len(self._live)
        num_running = min(num_live, self._max_rows)
        return EngineSnapshot(
            state=EngineState.RUNNING, num_running=num_running, num_waiting=num_live - num_running, num_blocks=1
        )

    def _main(self) -> None:
        due = time.monotonic()
        while True:
            with self._news:
                while not (self._live or self._ends or self._is_stopped):
                    self._news.wait()
                if self._is_stopped:
                    return
                events = self._step()
            self._deliver(events)
            now = time.monotonic()
            due = max(due + self._step_s, now)  # a step that came late makes no later one come early
            time.sleep(due - now)

    def _step(self) -> list[Event]:
        events: list[Event] = [*self._ends]
        self._ends.clear()
        for request, index in list(islice(self._live.values(), self._max_rows)):
            token = self._tokens[index % len(self._tokens)]
            events.append(TokenEvent(request=request.id, index=index, token=token))
            if index + 1 == request.sampling.max_new_tokens:
                del self._live[request.id]
                events.append(_finished(request))
            else:
                self._live[request.id] = (request, index + 1)
        return events


def _finished(request: Request) -> FinishEvent:
    return FinishEvent(
        request=request.id,
        reason=FinishReason.LENGTH,
        num_prompt_tokens=len(request.prompt),
        num_output_tokens=request.sampling.max_new_tokens,
    )
