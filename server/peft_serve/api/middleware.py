"""What every exchange gets: an id, a bounded body, no encoded bodies, and an answer even to a fault of ours.

Plain ASGI, outside the routes. Owns nothing; puts `request_id` into the scope's state.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peft_serve.api.problems import family_of, problem_of, response_of
from peft_serve.config import MIB
from peft_serve.errors import BadRequest, Internal, PayloadTooLarge, ServeError, UnsupportedMediaType

UPLOAD_PREFIX: Final = "/adapters"
UPLOAD_OVERHEAD_BYTES: Final = 1 * MIB  # archive headers, multipart boundaries, the files beside the weights

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Envelope:
    """Wraps the application; see the module's docstring."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, max_upload_bytes: int, new_id: Callable[[], str]) -> None:
        self._app = app
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
        reply = _Reply(send, request_id)
        try:
            body = self._checked_body(scope["path"], headers, receive)
            await self._app(scope, body, reply)
        except ServeError as error:
            await self._refuse(error, scope, receive, reply)
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
        await response_of(problem_of(error, family), family, request_id)(scope, receive, reply)


class _Reply:
    """`send`, with the request's id in the headers, remembering whether an answer has begun."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.has_started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_started = True
            MutableHeaders(scope=message)["x-request-id"] = self._request_id
        await self._send(message)


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
