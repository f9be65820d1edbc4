"""The turnstile: of requests that arrive together, a lot begins in each turn of the event loop, in order.

Reading, checking and admitting a request takes the loop about a millisecond; a thousand of them at once would make
every stream that runs wait for a second. Plain ASGI. Owns the line of those that have not begun.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from peft_serve.engine.lots import Lot

MOST: Final = 16
"""Requests that begin in one turn, where turns are short."""


class Turnstile:
    """Wraps the application. `clock` gives seconds."""

    def __init__(self, app: ASGIApp, *, clock: Callable[[], float], most: int = MOST) -> None:
        self._app = app
        self._lot = Lot(clock, most=most)
        self._line: deque[asyncio.Future[None]] = deque()
        self._num_left = 0  # that may begin in this turn
        self._is_turning = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._enter()
        await self._app(scope, receive, send)

    async def _enter(self) -> None:
        if not self._is_turning:
            self._is_turning = True
            self._begin_turn()
        if self._num_left > 0 and not self._line:
            self._num_left -= 1
            return
        place = asyncio.get_running_loop().create_future()
        self._line.append(place)
        await place

    def _begin_turn(self) -> None:
        self._lot.turn()
        self._num_left = self._lot.size
        asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        """Those that came first begin; without any the turnstile rests until somebody comes."""
        if not self._line:
            self._is_turning = False
            self._lot.rest()
            return
        self._begin_turn()
        while self._line and self._num_left > 0:
            place = self._line.popleft()
            if not place.done():  # its client may have left meanwhile
                place.set_result(None)
                self._num_left -= 1
