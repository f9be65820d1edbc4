"""Threads for tokenising long texts, shared fairly between tenants.

A text of megabytes keeps a thread for long, and cannot be stopped. So a tenant has one giant done at a time, and one
other long text; its others wait in lines of their own, and a line that is full is told so. Giants have all threads but
one at most. What is promised then: a text that is no giant waits for no giant, whoever sent it; and between two works
of one tenant every other tenant that waits has its turn. Owns the lines; belongs to one event loop. Knows no
tokenizer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Final, NamedTuple, ParamSpec, TypeVar

from peft_serve.api.store_threads import StoreThreads
from peft_serve.errors import QueueFull

NUM_THREADS: Final = 2
RETRY_AFTER_S: Final = 1.0
GIANT_CHARS: Final = 1 << 16
"""Longer texts are giants: a prompt of many pages is none."""

P = ParamSpec("P")
T = TypeVar("T")


class Line(NamedTuple):
    """Works of one tenant that are done one after the other."""

    tenant: str
    is_giant: bool


class TextThreads:
    """`max_waiting` works of a line wait for a thread, besides the one that is done."""

    def __init__(self, *, max_waiting: int, num_threads: int = NUM_THREADS) -> None:
        self._max_waiting = max_waiting
        self._num_free = num_threads
        self._max_giants = max(1, num_threads - 1)
        self._threads = StoreThreads(num_threads=num_threads, name="text")
        self._busy: set[Line] = set()  # that have a thread
        self._lines: dict[Line, deque[asyncio.Future[None]]] = {}  # who waits, the line whose turn is next first

    async def run(self, tenant: str, num_chars: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work` over so many characters gives or raises, once it is the tenant's turn.

        Raises QueueFull when too many wait already. Whoever is cancelled waits no longer; a work that has begun keeps
        its thread to its end.
        """
        line = Line(tenant, num_chars > GIANT_CHARS)
        await self._turn(line)
        future = self._threads.submit(work, *args, **kwargs)
        loop = asyncio.get_running_loop()

        def ended(_: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server stopped meanwhile
                loop.call_soon_threadsafe(self._give_back, line)

        future.add_done_callback(ended)
        return await asyncio.wrap_future(future)

    async def _turn(self, line: Line) -> None:
        """Wait for a thread; at the end the line has it."""
        num_waiting = len(self._lines.get(line, ()))
        if num_waiting >= self._max_waiting and not self._may_go(line):
            raise QueueFull(
                f"{num_waiting} long texts wait to be tokenised, and this server keeps {self._max_waiting} of a tenant "
                "waiting (--max-queue); try again later, or send shorter texts",
                retry_after_s=RETRY_AFTER_S,
            )
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(line, deque()).append(mine)
        self._hand_out()
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():  # it had come to the front at the same moment
                self._give_back(line)
            else:
                self._leave(line, mine)
            raise

    def _may_go(self, line: Line) -> bool:
        """Whether there is a thread for the first of the line."""
        if line in self._busy or not self._num_free:
            return False
        return not line.is_giant or sum(each.is_giant for each in self._busy) < self._max_giants

    def _hand_out(self) -> None:
        """Free threads go to the lines in turn, none to a line that has one."""
        while (line := next(filter(self._may_go, self._lines), None)) is not None:
            waiting = self._lines.pop(line)
            first = waiting.popleft()
            if waiting:
                self._lines[line] = waiting
            if first.cancelled():
                continue
            self._num_free -= 1
            self._busy.add(line)
            first.set_result(None)

    def _give_back(self, line: Line) -> None:
        self._num_free += 1
        self._busy.discard(line)
        if line in self._lines:
            self._lines[line] = self._lines.pop(line)  # behind all that wait by now
        self._hand_out()

    def _leave(self, line: Line, one: asyncio.Future[None]) -> None:
        waiting = self._lines.get(line)
        if waiting is not None and one in waiting:
            waiting.remove(one)
            if not waiting:
                del self._lines[line]
