"""Threads for tokenising long texts, shared fairly between tenants.

A text of megabytes keeps a thread for seconds. A tenant has one such work done at a time and its others wait in its
own line, the lines take turns, and a line that is full is told so: no tenant can take what another one, the metrics
page or the watch over the keys needs. Owns the lines; belongs to one event loop. Knows no tokenizer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Final, ParamSpec, TypeVar

from peft_serve.api.store_threads import StoreThreads
from peft_serve.errors import QueueFull

NUM_THREADS: Final = 2
RETRY_AFTER_S: Final = 1.0

P = ParamSpec("P")
T = TypeVar("T")


class TextThreads:
    """`max_waiting` works of one tenant wait for a thread, besides the one that is done."""

    def __init__(self, *, max_waiting: int, num_threads: int = NUM_THREADS) -> None:
        self._max_waiting = max_waiting
        self._num_free = num_threads
        self._threads = StoreThreads(num_threads=num_threads, name="text")
        self._busy: set[str] = set()  # tenants that have a thread
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}  # who waits, the tenant whose turn is next first

    async def run(self, tenant: str, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work` gives or raises, once it is the tenant's turn. Raises QueueFull when too many wait already.

        Whoever is cancelled waits no longer; a work that has begun keeps its thread to its end.
        """
        await self._turn(tenant)
        future = self._threads.submit(work, *args, **kwargs)
        loop = asyncio.get_running_loop()

        def ended(_: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server stopped meanwhile
                loop.call_soon_threadsafe(self._give_back, tenant)

        future.add_done_callback(ended)
        return await asyncio.wrap_future(future)

    async def _turn(self, tenant: str) -> None:
        """Wait for a thread; at the end the tenant has it."""
        line = self._lines.get(tenant, ())
        must_wait = tenant in self._busy or not self._num_free
        if must_wait and len(line) >= self._max_waiting:
            raise QueueFull(
                f"{len(line)} long texts wait to be tokenised, and this server keeps {self._max_waiting} of a tenant "
                "waiting (--max-queue); try again later, or send shorter texts",
                retry_after_s=RETRY_AFTER_S,
            )
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(tenant, deque()).append(mine)
        self._hand_out()
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():  # it had come to the front at the same moment
                self._give_back(tenant)
            else:
                self._leave(tenant, mine)
            raise

    def _hand_out(self) -> None:
        """Free threads go to the lines in turn, none to a tenant that has one."""
        while self._num_free:
            tenant = next((each for each in self._lines if each not in self._busy), None)
            if tenant is None:
                return
            line = self._lines.pop(tenant)
            first = line.popleft()
            if line:
                self._lines[tenant] = line  # behind the others
            if first.cancelled():
                continue
            self._num_free -= 1
            self._busy.add(tenant)
            first.set_result(None)

    def _give_back(self, tenant: str) -> None:
        self._num_free += 1
        self._busy.discard(tenant)
        self._hand_out()

    def _leave(self, tenant: str, one: asyncio.Future[None]) -> None:
        line = self._lines.get(tenant)
        if line is not None and one in line:
            line.remove(one)
            if not line:
                del self._lines[tenant]
