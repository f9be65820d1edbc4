"""uvicorn's server, stopping in the order that load balancers and supervisors need.

Told by SIGTERM to stop, it admits nothing more and goes on listening for a while: a probe sees the 503 of `/readyz`
and takes the server out before connections are refused. Without an engine it ends by itself, so that whoever started
it starts it again. Knows of the engine what it is given: a question and two calls.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

import uvicorn

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_LOOK_S: Final = 0.05

_log = logging.getLogger(__name__)


class Listener(uvicorn.Server):
    """`on_listening` is told the port (it may have been 0), `on_stopping` that nothing more is to be admitted.

    `is_dead` is asked ten times a second; `delay_s` is how long connections are taken after SIGTERM, `drain_s` how long
    what runs then has; `on_overdue` is called when that is over and somebody still waits.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        on_listening: Callable[[int], None],
        on_stopping: Callable[[], None],
        on_overdue: Callable[[], None],
        is_dead: Callable[[], bool],
        delay_s: float,
        drain_s: float,
    ) -> None:
        super().__init__(config)
        self._on_listening = on_listening
        self._on_stopping = on_stopping
        self._is_dead = is_dead
        self._delay_s = delay_s
        self._drain_s = drain_s
        self._on_overdue = on_overdue
        self._was_told_to_stop = False  # by SIGTERM; whoever presses Ctrl-C has no load balancer to wait for

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets=sockets)
        for bound in (each for server in self.servers for each in server.sockets):
            self._on_listening(int(bound.getsockname()[1]))
            return

    async def on_tick(self, counter: int) -> bool:
        if self._is_dead():
            _log.critical("the engine is dead: the server ends, and is to be started again")
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: Any = None) -> None:
        self._on_stopping()
        if self._was_told_to_stop:
            await self._linger()
        overdue = asyncio.get_running_loop().call_later(self._drain_s, self._on_overdue)
        try:
            await super().shutdown(sockets=sockets)
        finally:
            overdue.cancel()

    async def _linger(self) -> None:
        clock = asyncio.get_running_loop().time
        until_s = clock() + self._delay_s
        while clock() < until_s and not self.force_exit:
            await asyncio.sleep(min(_LOOK_S, self._delay_s))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._was_told_to_stop = self._was_told_to_stop or sig == signal.SIGTERM
        super().handle_exit(sig, frame)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises the signal again once the server has stopped: the process would die of it before the
        engine has written what is to be kept."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        earlier = {each: signal.signal(each, self.handle_exit) for each in _SIGNALS}
        try:
            yield
        finally:
            for each, handler in earlier.items():
                signal.signal(each, handler)
