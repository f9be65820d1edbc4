"""What an event loop costs and how late it is, measured inside the process it runs in.

Wraps an application: between `POST /loop-watch` and `GET /loop-watch` a task sleeps `PERIOD_S` again and again and
notes how late it wakes up; the time that the loop's thread computes comes from the system's clock of that thread.
"""

import asyncio
import json
import resource
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict, dataclass
from typing import Any

from loadtest.measure import percentile

PATH = "/loop-watch"
PERIOD_S = 0.01

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopFigures:
    """One watch, in seconds. `loop_cpu_s` is the computing time of the loop's thread alone, `process_cpu_s` that of
    every thread."""

    seconds: float
    loop_cpu_s: float
    process_cpu_s: float
    lag_p50_s: float
    lag_p99_s: float
    lag_max_s: float


class LoopWatch:
    """The application `app`, and the route that watches its loop."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._lags: list[float] = []
        self._task: asyncio.Task[None] | None = None
        self._begin: tuple[float, float, float] = (0.0, 0.0, 0.0)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer on `PATH`, pass everything else on."""
        if scope["type"] != "http" or scope["path"] != PATH:
            await self._app(scope, receive, send)
            return
        if scope["method"] == "POST":
            self._start()
            body = b"{}"
        else:
            body = json.dumps(asdict(self._figures())).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": body})

    def _start(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._lags = []
        self._begin = _clocks()
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            due = time.monotonic() + PERIOD_S
            await asyncio.sleep(PERIOD_S)
            self._lags.append(max(0.0, time.monotonic() - due))

    def _figures(self) -> LoopFigures:
        seconds, loop_s, process_s = (end - begin for end, begin in zip(_clocks(), self._begin, strict=True))
        return LoopFigures(
            seconds=seconds,
            loop_cpu_s=loop_s,
            process_cpu_s=process_s,
            lag_p50_s=percentile(self._lags, 50),
            lag_p99_s=percentile(self._lags, 99),
            lag_max_s=percentile(self._lags, 100),
        )


def _clocks() -> tuple[float, float, float]:
    """Now, and the computing time so far of this thread and of the process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.monotonic(), time.thread_time(), usage.ru_utime + usage.ru_stime
