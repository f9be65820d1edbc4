"""The client: plays a trace against a server over HTTP and notes when every token came.

*Open loop* sends each request at its time whatever the server does; *closed loop* keeps a fixed number in
flight. What is sent and how the answer is read is a `loadtest.routes.Route`.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import aiohttp

from loadtest.outcome import UNFINISHED, Outcome
from loadtest.routes import Answer, Native, Route
from loadtest.sse import EventSplitter
from loadtest.trace import TraceRequest

DONE = b"[DONE]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """How to reach the server: `url` without a path, which is the route's. `keeps_connections` is False for one that
    closes a connection after its answer without saying so."""

    url: str
    route: Route = field(default_factory=Native)
    api_key: str | None = None
    timeout_s: float = 600.0
    drain_s: float = 60.0
    keeps_connections: bool = True


@dataclass(slots=True)
class _Recording:
    """One request while it runs; becomes an `Outcome` however it ends."""

    request: TraceRequest
    due_s: float
    sent_s: float
    pieces: list[bytes] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    status: int = 0

    def end(self, end_s: float, answer: Answer) -> Outcome:
        return Outcome(
            index=self.request.index,
            adapter=self.request.adapter,
            due_s=self.due_s,
            sent_s=self.sent_s,
            end_s=end_s,
            token_times_s=answer.token_times_s,
            prompt_tokens=answer.prompt_tokens if self.prompt_tokens is None else self.prompt_tokens,
            max_new_tokens=self.request.max_new_tokens,
            status=self.status,
            error=answer.error,
            text=answer.text,
        )

    def broken_off(self, error: str) -> Answer:
        return Answer(token_times_s=tuple(self.times_s), error=error)


class LoadClient:
    """Plays requests; use as ``async with LoadClient(options) as client``."""

    def __init__(self, options: ClientOptions, *, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock` gives seconds."""
        self._options = options
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        """Open the connections' pool, without a limit: the load is decided by the trace alone."""
        key = self._options.api_key
        self._session = aiohttp.ClientSession(
            base_url=self._options.url,
            connector=aiohttp.TCPConnector(limit=0, force_close=not self._options.keeps_connections),
            timeout=aiohttp.ClientTimeout(total=self._options.timeout_s),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()

    async def open_loop(
        self, requests: Sequence[TraceRequest], *, on_done: Callable[[], None] = lambda: None
    ) -> list[Outcome]:
        """Send each request at its arrival time, then wait `drain_s` at most; what is still unanswered is
        dropped and counts as the error ``unfinished``. Outcomes come in the order of `requests`."""
        start = self._clock()
        tasks = []
        for request in requests:
            await asyncio.sleep(max(0.0, start + request.arrival_s - self._clock()))
            tasks.append(asyncio.create_task(self._play(request, start, request.arrival_s, on_done)))
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self._options.drain_s)
            for task in late:
                task.cancel()
        return list(await asyncio.gather(*tasks))

    async def closed_loop(
        self,
        requests: Sequence[TraceRequest],
        *,
        concurrency: int,
        duration_s: float | None = None,
        on_done: Callable[[], None] = lambda: None,
    ) -> list[Outcome]:
        """Keep `concurrency` requests in flight until all are answered or `duration_s` is over; those in
        flight then are dropped as ``unfinished``. Outcomes come in the order in which requests were begun."""
        start = self._clock()
        waiting: Iterator[TraceRequest] = iter(requests)
        begun: list[Outcome] = []

        async def worker() -> None:
            for request in waiting:
                outcome = await self._play(request, start, self._clock() - start, on_done)
                begun.append(outcome)
                over = duration_s is not None and self._clock() - start >= duration_s
                if over or outcome.error == UNFINISHED:
                    return

        tasks = [asyncio.create_task(worker()) for _ in range(concurrency)]
        _, late = await asyncio.wait(tasks, timeout=duration_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks)
        return sorted(begun, key=lambda outcome: outcome.index)

    async def _play(self, request: TraceRequest, start: float, due_s: float, on_done: Callable[[], None]) -> Outcome:
        recording = _Recording(request, due_s, self._clock() - start)
        try:
            answer = await self._stream(recording, start)
        except asyncio.CancelledError:
            answer = recording.broken_off(UNFINISHED)
        except TimeoutError:
            answer = recording.broken_off("timeout")
        except (aiohttp.ClientError, OSError, ValueError) as problem:
            answer = recording.broken_off(type(problem).__name__)
        on_done()
        return recording.end(self._clock() - start, answer)

    async def _stream(self, recording: _Recording, start: float) -> Answer:
        assert self._session is not None, "use the client in `async with`"
        request, route = recording.request, self._options.route
        ask = route.ask(request)
        async with self._session.post(ask.path, params=ask.query, json=ask.body) as response:
            recording.status = response.status
            if response.status != 200:
                return Answer(error=f"status {response.status}")
            counted = response.headers.get("x-prompt-tokens")
            recording.prompt_tokens = int(counted) if counted else None
            splitter = EventSplitter()
            async for chunk in response.content.iter_any():
                payloads = [payload for payload in splitter.feed(chunk) if payload != DONE]
                recording.times_s.extend([self._clock() - start] * len(payloads))
                recording.pieces.extend(payloads)
        return route.read(request, recording.pieces, recording.times_s)
