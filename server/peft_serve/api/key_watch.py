"""Looks whether the file of keys has changed: every second, and at once on SIGHUP. Owns one task and one signal."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

from peft_serve.api.keyring import Keyring
from peft_serve.api.store_threads import StoreThreads

EVERY_S: Final = 1.0
"""A key that is taken out of the file is refused after so long."""


@asynccontextmanager
async def watched_keys(keyring: Keyring, *, every_s: float = EVERY_S) -> AsyncIterator[None]:
    """The file is watched inside; without one nothing is done."""
    if keyring.path is None:
        yield
        return
    loop, hung_up = asyncio.get_running_loop(), asyncio.Event()
    has_signal = threading.current_thread() is threading.main_thread()
    if has_signal:
        loop.add_signal_handler(signal.SIGHUP, hung_up.set)
    task = loop.create_task(_watch(keyring, hung_up, every_s))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        if has_signal:
            loop.remove_signal_handler(signal.SIGHUP)


async def _watch(keyring: Keyring, hung_up: asyncio.Event, every_s: float) -> None:
    thread = StoreThreads(num_threads=1, name="keys")  # its own: nothing that is slow may keep a withdrawn key valid
    while True:
        with suppress(TimeoutError):
            await asyncio.wait_for(hung_up.wait(), every_s)
        is_forced = hung_up.is_set()
        hung_up.clear()
        await asyncio.wrap_future(thread.submit(keyring.renew, is_forced=is_forced))
