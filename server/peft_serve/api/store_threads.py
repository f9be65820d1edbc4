"""Threads for what reads and writes the store, apart from those for everything else.

A disk that does not answer keeps whoever waits for it, on a thread each. Were these the event loop's own, a few calls
to `/adapters` would use them up, and nobody could tokenise a long prompt or render the metrics any more. They are
daemons: a process that stops waits for no disk either; what a change had not acknowledged was promised to nobody.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Final, ParamSpec, TypeVar

from peft_serve.errors import Unavailable

NUM_THREADS: Final = 8
PATIENCE_S: Final = 60.0

P = ParamSpec("P")
T = TypeVar("T")


class StoreThreads:
    """Up to `num_threads` threads, made when they are needed. `patience_s`: so long a call waits for one of them."""

    def __init__(self, *, num_threads: int = NUM_THREADS, patience_s: float = PATIENCE_S, name: str = "store") -> None:
        self._num_threads = num_threads
        self._patience_s = patience_s
        self._name = name
        self._lock = threading.Lock()
        self._num_made = 0
        self._num_open = 0  # calls that wait or run
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def submit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have `work` done on one of the threads, in the caller's context."""
        future: Future[T] = Future()
        job = partial(contextvars.copy_context().run, work, *args, **kwargs)
        with self._lock:
            self._num_open += 1
            needs_thread = self._num_made < min(self._num_open, self._num_threads)
            number = self._num_made
            self._num_made += needs_thread
        self._calls.put(lambda: _settle(future, job))
        if needs_thread:
            threading.Thread(target=self._main, name=f"{self._name}-{number}", daemon=True).start()
        return future

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work` gives or raises. Raises Unavailable, and does nothing, when no thread is free for it in time.

        What has begun goes on, and is waited for: whether a change was made is to be told. Whoever is cancelled
        waits no longer.
        """
        future = self.submit(work, *args, **kwargs)
        waiting = asyncio.wrap_future(future)
        try:
            done, _ = await asyncio.wait([waiting], timeout=self._patience_s)
            if not done and future.cancel():
                raise Unavailable(
                    "the adapter store does not answer; adapters that are in use go on being served",
                    retry_after_s=30.0,
                )
            return await waiting
        except asyncio.CancelledError:
            waiting.cancel()
            raise

    def _main(self) -> None:
        while True:
            self._calls.get()()
            with self._lock:
                self._num_open -= 1


def _settle(future: Future[T], job: Callable[[], T]) -> None:
    """Do the job of a future, unless nobody waits for it any more."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(job())
    except BaseException as error:  # noqa: BLE001  (it is the caller's; the thread goes on)
        future.set_exception(error)
