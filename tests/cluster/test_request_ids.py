"""One `x-request-id` in an answer, as behind Ray Serve's proxy."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI

pytest.importorskip("ray.serve")
from ray.serve._private.http_util import RequestIdMiddleware

from peft_serve.cluster.request_ids import OneRequestId


async def test_an_answer_has_one_request_id() -> None:
    app = FastAPI()

    @app.get("/")
    async def root() -> str:
        return "yes"

    async def named(scope: object, receive: object, send: object) -> None:  # as the envelope does
        async def with_id(message: dict[str, object]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", b"mine"), (b"x-other", b"kept")]  # type: ignore[misc]
            await send(message)  # type: ignore[operator]

        await app(scope, receive, with_id)  # type: ignore[arg-type]

    transport = httpx.ASGITransport(app=RequestIdMiddleware(OneRequestId(named)))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.get("/", headers={"x-request-id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"]
    assert answer.headers["x-other"] == "kept"
