"""The name of a request in its answer's headers, which Ray Serve's proxy writes for every application."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class OneRequestId:
    """Leaves `x-request-id` out of answers: the proxy gives a request that has none its name, passes it on, and appends
    it to the answer, whatever is there. There is no option against it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self._app(scope, receive, without_id)
