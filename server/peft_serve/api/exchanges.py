"""One record of every exchange, made at its end: what was asked of which route, who answered, and how long it took.

Plain ASGI, around everything else. The record holds names, sizes and times, never a prompt or an answer; who keeps it
(the access log, tracing) is told by the assembly. Owns nothing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peft_serve.api.generation import Generation
from peft_serve.api.principal import STATE, Principal
from peft_serve.metrics import RequestFigures

PROBES: Final = frozenset({"/livez", "/readyz", "/health", "/metrics", "/metrics/gateway"})
"""Routes that machines ask every few seconds."""

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One of the engine's requests that an exchange led to."""

    figures: RequestFigures
    digests: tuple[str, ...]  # of the adapter's files; none: the base
    offset_s: float  # from the exchange's beginning to its submission


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A request and its answer. Times in seconds."""

    request_id: str
    method: str
    path: str  # as it was sent, without the query: callers chose every character of it
    route: str | None  # the route's pattern; None where no route answers
    status: int | None  # None: the client was gone before there was one
    is_whole: bool  # whether the answer was sent to its end
    error: str | None  # the code of the refusal
    client: str | None  # the address it came from
    tenant: str | None = None  # whose key it carried
    began_s: float  # unix time
    total_s: float
    works: tuple[Work, ...]
    trace_headers: Mapping[str, str]  # W3C's, as they were sent

    @property
    def is_probe(self) -> bool:
        return self.path in PROBES

    @property
    def trace_id(self) -> str | None:
        """The id of the trace that the caller says this belongs to."""
        found = _TRACEPARENT.fullmatch(self.trace_headers.get("traceparent", ""))
        return None if found is None else found[1]


class Tracer(Protocol):
    """Who turns exchanges into spans."""

    def record(self, exchange: Exchange) -> str | None:
        """Make a span of it; the trace's id, or None where the trace is not kept."""
        ...

    def close(self) -> None:
        """Send what is left; may block."""
        ...


class Exchanges:
    """Wraps the application. `now` gives unix seconds and `clock` the server's monotonic ones."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        log: Callable[[Exchange, str | None], None],
        tracer: Tracer | None,
        now: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        """`log` is told of every exchange at its end, with the id of its trace."""
        self._app = app
        self._log = log
        self._tracer = tracer
        self._now = now
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s, start_s = self._now(), self._clock()
        sent = _Sent(send)
        try:
            await self._app(scope, receive, sent)
        finally:
            self._note(_exchange(scope, sent, began_s=began_s, start_s=start_s, end_s=self._clock()))

    def _note(self, exchange: Exchange) -> None:
        trace_id = exchange.trace_id
        try:
            if self._tracer is not None and not exchange.is_probe:
                trace_id = self._tracer.record(exchange) or trace_id
            self._log(exchange, trace_id)
        except Exception:  # the answer has been given, and a record is not worth its connection
            logging.getLogger("peft_serve.api").exception("request %s was not recorded", exchange.request_id)


class _Sent:
    """`send`, remembering the status and whether the end was sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        self.is_whole = False

    async def __call__(self, message: Message) -> None:
        await self._send(message)
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.is_whole = not message.get("more_body", False)


def _exchange(scope: Scope, sent: _Sent, *, began_s: float, start_s: float, end_s: float) -> Exchange:
    state: dict[str, Any] = scope.get("state", {})
    headers = Headers(scope=scope)
    client = scope.get("client")
    return Exchange(
        request_id=state.get("request_id", ""),
        method=scope["method"],
        path=scope["path"],
        route=getattr(scope.get("route"), "path", None),
        status=sent.status,
        is_whole=sent.is_whole,
        error=state.get("error"),
        client=None if client is None else client[0],
        tenant=_tenant(state),
        began_s=began_s,
        total_s=end_s - start_s,
        works=_works(state.get("generations", ()), start_s),
        trace_headers={name: headers[name] for name in ("traceparent", "tracestate") if name in headers},
    )


def _tenant(state: Mapping[str, Any]) -> str | None:
    principal = state.get(STATE)
    return (principal.tenant.name or None) if isinstance(principal, Principal) else None


def _works(generations: Sequence[Generation], start_s: float) -> tuple[Work, ...]:
    return tuple(
        Work(
            figures=each.figures,
            digests=tuple(part.resolved.id for part in each.plan.served.parts),
            offset_s=max(0.0, each.start_s - start_s),
        )
        for each in generations
        if each.figures is not None
    )
