"""What every exchange gets: an id, a body of bounded size and time, no encoded bodies, and an answer even to a fault
of ours.

Plain ASGI, outside the routes. Owns nothing; puts `request_id` into the scope's state.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peft_serve.api.problems import family_of, problem_of, response_of
from peft_serve.config import MIB
from peft_serve.errors import (
    BadRequest,
    Internal,
    PayloadTooLarge,
    RequestTimeout,
    ServeError,
    UnsupportedMediaType,
)

UPLOAD_PREFIX: Final = "/adapters"
UPLOAD_OVERHEAD_BYTES: Final = 1 * MIB  # archive headers, multipart boundaries, the files beside the weights
DRAIN_BYTES: Final = 64 * MIB
DRAIN_S: Final = 5.0
"""How much of a body that nobody read is taken in before the connection may be closed, and for how long: closing it
under a client that still sends makes many of them miss the answer."""
MIN_BODY_BYTES_PER_S: Final = 1 << 10
"""A body has `body_s`, and a second more for each so many bytes that have come of it."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Envelope:
    """Wraps the application; see the module's docstring. `body_s`: how long a body that does not come is waited for."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        max_upload_bytes: int,
        body_s: float,
        new_id: Callable[[], str],
    ) -> None:
        self._app = app
        self._body_s = body_s
        self._max_body_bytes = max_body_bytes
        self._max_upload_bytes = max_upload_bytes + UPLOAD_OVERHEAD_BYTES
        self._new_id = new_id
        self._log = logging.getLogger("peft_serve.api")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else self._new_id()
        scope.setdefault("state", {})["request_id"] = request_id
        body = _Body(receive, headers, self._body_s)
        reply = _Reply(send, request_id, body)
        try:
            await self._app(scope, self._checked_body(scope["path"], headers, body), reply)
        except ServeError as error:
            await self._refuse(error, scope, receive, reply)
        except ClientDisconnect:
            scope["state"]["error"] = "client_closed"  # before its body had come: there is nobody to answer
        except Exception:
            self._log.exception("request %s failed", request_id)
            if reply.has_started:
                raise  # the server closes the connection: half an answer must not look whole
            await self._refuse(Internal("an error on the server's side"), scope, receive, reply)

    def _checked_body(self, path: str, headers: Headers, receive: Receive) -> Receive:
        if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise UnsupportedMediaType("content-encoding: bodies are read as they are; send it without one")
        is_upload = path == UPLOAD_PREFIX or path.startswith(f"{UPLOAD_PREFIX}/")
        limit = self._max_upload_bytes if is_upload else self._max_body_bytes
        length = headers.get("content-length", "0").strip()
        if not (length.isascii() and length.isdigit()):
            raise BadRequest("content-length: not a number of bytes")
        if len(length) > 18 or int(length) > limit:
            raise _too_large(limit)
        return _counted(receive, limit)

    async def _refuse(self, error: ServeError, scope: Scope, receive: Receive, reply: _Reply) -> None:
        if reply.has_started:
            raise error
        family = family_of(scope["path"])
        request_id = scope["state"]["request_id"]
        problem = problem_of(error, family)
        scope["state"]["error"] = problem.code
        await response_of(problem, family, request_id)(scope, receive, reply)


class _Reply:
    """`send`, with the request's id in the headers, remembering whether an answer has begun.

    An answer to a body that was not read to its end is sent whole, and ended when the body was taken in. Its connection
    ends with it: where the next request would begin is the client's word.
    """

    def __init__(self, send: Send, request_id: str, body: _Body) -> None:
        self._send = send
        self._request_id = request_id
        self._body = body
        self.has_started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_started = True
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._request_id
            if self._body.is_unread:
                headers["connection"] = "close"
        elif self._body.is_left and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._body.drain()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)


class _Body:
    """`receive`, knowing whether something of the request's body is still to come, and since when it is waited for."""

    def __init__(self, receive: Receive, headers: Headers, body_s: float) -> None:
        self._receive = receive
        self._body_s = body_s
        self._num_bytes = 0
        # A client that waits to be told to go on has sent nothing, and sends nothing once it has its answer.
        self._is_held = headers.get("expect", "").strip().lower() == "100-continue"
        self.is_unread = "transfer-encoding" in headers or headers.get("content-length", "0").strip() != "0"
        self._until_s: float | None = None  # on the loop's clock

    @property
    def is_left(self) -> bool:
        """Whether more of it comes, whatever is answered."""
        return self.is_unread and not self._is_held

    async def __call__(self) -> Message:
        if not self.is_unread:
            return await self._receive()  # that the client has gone
        self._is_held = True  # while it is waited for, and for good if that comes to nothing
        if self._until_s is None:
            self._until_s = asyncio.get_running_loop().time() + self._body_s
        try:
            async with asyncio.timeout_at(self._until_s):
                message = await self._receive()
        except TimeoutError:
            raise self._too_slow() from None
        self._is_held = False
        num_bytes = len(message.get("body", b""))
        self._num_bytes += num_bytes
        self._until_s += num_bytes / MIN_BODY_BYTES_PER_S
        self.is_unread = message["type"] == "http.request" and bool(message.get("more_body", False))
        return message

    def _too_slow(self) -> RequestTimeout:
        took_s = self._body_s + self._num_bytes / MIN_BODY_BYTES_PER_S
        return RequestTimeout(
            f"body: {self._num_bytes} bytes of it came in {took_s:.1f} s; it has {self._body_s:g} s (--body-timeout-s) "
            f"and a second more for each {MIN_BODY_BYTES_PER_S} bytes that come; send it faster"
        )

    async def drain(self) -> None:
        """Take in what is left of the body and drop it, up to a bound of bytes and of time."""
        num_read = 0
        with suppress(TimeoutError, RequestTimeout):
            async with asyncio.timeout(DRAIN_S):
                while self.is_left and num_read <= DRAIN_BYTES:
                    num_read += len((await self()).get("body", b""))


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"body: more than {limit} bytes, the largest this route takes")


def _counted(receive: Receive, limit: int) -> Receive:
    """`receive`, counting the body as it comes: a length that is announced can be wrong, or missing."""
    num_read = 0

    async def counted() -> Message:
        nonlocal num_read
        message = await receive()
        num_read += len(message.get("body", b""))
        if num_read > limit:
            raise _too_large(limit)
        return message

    return counted
