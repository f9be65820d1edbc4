"""How late the event loop is: what every stream and every request waits for before anything else.

A task that sleeps and notes how much later than asked for it wakes up. Knows no request and no metric by name.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

PERIOD_S: Final = 0.25


@asynccontextmanager
async def watched_lag(observe: Callable[[float], None], *, period_s: float = PERIOD_S) -> AsyncIterator[None]:
    """While this is open, `observe` is told the running loop's lateness in seconds, once in `period_s`."""
    task = asyncio.ensure_future(_watch(observe, period_s))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _watch(observe: Callable[[float], None], period_s: float) -> None:
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + period_s
        await asyncio.sleep(period_s)
        observe(max(0.0, clock() - due))
