"""Connections as uvicorn keeps them, with bounds: nobody holds one by sending slowly, reading slowly, or not at all.

uvicorn waits without end for the head of a first request, for whoever does not read its answer, and lets a head grow
without limit. Here a head has a size and a time, what is written has to be taken, and where too many connections are
open those that idle make room. Whom a head may name is `commands.request_line`'s business; bodies are bounded where
they are read, in `api.middleware`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from peft_serve.api.problems import PROBLEM_TYPE, Family, Problem, body_of
from peft_serve.commands.request_line import UnclearRequest, read_line

OTHER_FILES: Final = 256
"""Descriptors that are kept for everything that is no connection."""

_TOO_LARGE: Final = "the head of this request is too large; send shorter headers, and what is long in the body"
_MALFORMED: Final = "this is no request in HTTP/1.1"
_UNKNOWN: Final = "this is no request in HTTP/1.1, or its method is none that HTTP has"
_TOO_MANY: Final = "every connection of this server is in use; try again in a moment"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """`head_s`: from a connection's, or a further request's, first moment to the end of its head. `stalled_s`: in so
    long a client takes `stalled_s * min_bytes_per_s` of what is written for it, or all of it, else it is cut off."""

    max_connections: int
    max_head_bytes: int = 64 << 10
    max_headers: int = 128
    head_s: float = 20.0
    stalled_s: float = 60.0
    min_bytes_per_s: int = 1 << 10


def room_for(max_connections: int) -> int:
    """How many connections this process may have: as many as were asked for, or as its descriptors allow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max_connections if soft == resource.RLIM_INFINITY else max(1, min(max_connections, soft - OTHER_FILES))


class Connections:
    """Makes the connections of one server (uvicorn's `http` class), and knows which of them idle.

    `new_id` gives an id for what is refused before it is a request of the application's.
    """

    def __init__(self, limits: ConnectionLimits, *, new_id: Callable[[], str]) -> None:
        self.limits = limits
        self.new_id = new_id
        self._idle: dict[Connection, None] = {}  # those that idle longest come first

    def __call__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> Connection:
        return Connection(self, config, server_state, app_state, _loop)

    def idles(self, one: Connection) -> None:
        self._idle[one] = None

    def works(self, one: Connection) -> None:
        self._idle.pop(one, None)

    def make_room(self) -> bool:
        """Close the connection that idled longest; False where none does."""
        for one in self._idle:
            self.works(one)
            one.transport.abort()
            return True
        return False


class Connection(HttpToolsProtocol):
    """One connection; see the module's docstring."""

    def __init__(
        self,
        line: Connections,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._line = line
        self._limits = line.limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._cycles: list[RequestResponseCycle] = []  # not answered to the end
        self._is_in_head = False
        self._is_leaving = False  # for another protocol
        self._is_too_large = False
        self._complaint = _MALFORMED
        self._was_heard = False  # whether the parser said anything of what it was just given
        self._num_quiet = 0  # bytes that the parser has been given since it said something
        self._num_head = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections and not self._line.make_room():
            self._refuse(503, "unavailable", _TOO_MANY, retry_after=True)
            return
        self._line.idles(self)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._line.works(self)
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)
        self._disconnect()

    def _disconnect(self) -> None:
        """Tell every request that its client has gone: uvicorn tells the last of several that were sent at once."""
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._was_heard = False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._stay(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._refuse_head(error)
        self._num_quiet = 0 if self._was_heard else self._num_quiet + len(data)
        if self._num_quiet > self._limits.max_head_bytes:  # in one field of a head, or of a trailer
            self._is_too_large = True
            self._refuse_head()
        if self._is_waiting:
            self._expect_head()

    def _stay(self, rest: bytes) -> None:
        """Read a request for another protocol as one without that wish. The parser takes what follows its head for the
        other protocol, and a body would be a request of its own."""
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/", self.parser.get_http_version().encode(), b"\r\n"]
        for name, value in self.headers:
            head += [] if name == b"upgrade" else [name, b": ", value, b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"".join([*head, b"\r\n", rest]))

    @property
    def _is_waiting(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    # what the parser says

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head, self._num_head, self._was_heard = True, 0, True

    def on_url(self, url: bytes) -> None:
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(name, value)
        if self._is_in_head:  # a trailer is no header: whoever looks at headers has not seen it
            if len(self.headers) >= self._limits.max_headers:
                self._too_large()
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head, self._was_heard = False, True
        if self.parser.get_method() == b"CONNECT" or self.parser.get_http_version() not in ("1.0", "1.1"):
            raise ValueError(_MALFORMED)  # the parser stops, and its own error ends the reading
        self._is_leaving = self.parser.should_upgrade()
        if self._is_leaving:
            return
        self._settle_line()
        self._stop_head_timer()
        super().on_headers_complete()
        self._line.works(self)
        self._cycles = [each for each in self._cycles if not each.response_complete]
        self._cycles.append(self.cycle)

    def _settle_line(self) -> None:
        try:
            line = read_line(self.parser.get_method(), self.url, self.parser.get_http_version(), self.headers)
        except UnclearRequest as error:
            self._complaint = str(error)
            raise  # the parser stops, as above
        self.url, self.headers[:] = line.target, line.headers

    def on_body(self, body: bytes) -> None:
        self._was_heard = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._was_heard = True
        if not self._is_leaving:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._expect_reading()
        if self.transport.is_closing() or not self._is_waiting:
            return
        self._line.idles(self)
        if self._is_in_head:
            self._expect_head()

    def _count(self, *pieces: bytes) -> None:
        self._was_heard = True
        self._num_head += sum(map(len, pieces))
        if self._num_head > self._limits.max_head_bytes:
            self._too_large()

    def _too_large(self) -> None:
        self._is_too_large = True
        raise ValueError(_TOO_LARGE)

    # who sends slowly

    def _expect_head(self) -> None:
        if self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self._limits.head_s, self._head_is_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._is_in_head:
            what = f"the head of this request did not come whole in {self._limits.head_s:g} s; send it in one piece"
            self._refuse(408, "request_timeout", what)
        else:
            self.transport.close()

    # who reads slowly

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def _expect_reading(self) -> None:
        if self._write_timer is None:
            self._look_later()

    def _look_later(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self._limits.stalled_s, self._look_at_reading, left)

    def _look_at_reading(self, was_left: int) -> None:
        """Nothing is written while so much is left, but what was begun: what is gone was taken."""
        self._write_timer = None
        left = self.transport.get_write_buffer_size()
        if left and was_left - left < self._limits.stalled_s * self._limits.min_bytes_per_s:
            self.transport.abort()
        elif left:
            self._look_later()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # what is refused before there is a request

    def _refuse_head(self, error: httptools.HttpParserError | None = None) -> None:
        if self._is_too_large:
            self._refuse(431, "head_too_large", _TOO_LARGE)
        elif isinstance(error, httptools.HttpParserInvalidMethodError):
            self._refuse(400, "bad_request", _UNKNOWN)
        else:
            self._refuse(400, "bad_request", self._complaint)

    def _refuse(self, status: int, code: str, message: str, *, retry_after: bool = False) -> None:
        """Answer, unless an answer is being given to an earlier request, and close."""
        if self.transport.is_closing():
            return
        self._disconnect()
        if any(each.response_started and not each.response_complete for each in self._cycles):
            self.transport.abort()
            return
        request_id = self._line.new_id()
        _log.debug("request %s was refused before it was read: %s", request_id, message)
        problem = Problem(status=status, code=code, message=message)
        content = json.dumps(body := body_of(problem, Family.NATIVE, request_id)).encode()
        head = f"HTTP/1.1 {status} {body['title']}\r\ncontent-type: {PROBLEM_TYPE}\r\nconnection: close\r\n"
        head += "retry-after: 1\r\n" if retry_after else ""
        head += f"x-request-id: {request_id}\r\n"
        self.transport.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        self._stop_head_timer()
        self.transport.close()
