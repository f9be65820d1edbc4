"""HEAD: what GET would answer, without its body.

Plain ASGI, outside the routes, which know GET alone. A stream, or a long download, is ended at its first byte: the
route under it is told that the client has gone.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Heads:
    """Wraps the application; see the module's docstring."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        reply = _Head(receive, send)
        scope["method"] = "GET"  # in place: whoever stands outside reads from the same scope which route it was
        try:
            await self._app(scope, reply.receive, reply.send)
        finally:
            scope["method"] = "HEAD"
        await reply.close()


class _Head:
    """The head of one answer goes out; its body does not."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._has_body_begun = asyncio.Event()
        self._has_head = False

    async def receive(self) -> Message:
        """What the client sends, until the body begins: then the client counts as gone."""
        said = asyncio.ensure_future(self._receive())
        begun = asyncio.ensure_future(self._has_body_begun.wait())
        try:
            await asyncio.wait({said, begun}, return_when=asyncio.FIRST_COMPLETED)
            return said.result() if said.done() else {"type": "http.disconnect"}
        finally:
            said.cancel()
            begun.cancel()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_head = True
            await self._send(message)
        else:
            self._has_body_begun.set()

    async def close(self) -> None:
        if self._has_head:
            await self._send({"type": "http.response.body", "body": b""})
