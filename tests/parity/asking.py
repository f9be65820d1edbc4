"""Many calls at the same time, each on a connection of its own that carries nothing else.

httpx looks through all of its connections for every request, and reads the certificates of this machine for every
client: with hundreds of calls at once that costs more than the server's answers do.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

MOST_AT_ONCE: Final = 200

Call = tuple[str, dict[str, Any]]
"""An adapter's name, and the body of a request to `/generate`."""


async def generate_all(url: str, calls: list[Call]) -> list[dict[str, Any]]:
    """The answers to all of them, in their order; anything but 200 is an AssertionError."""
    gate = asyncio.Semaphore(MOST_AT_ONCE)

    async def gated(call: Call) -> dict[str, Any]:
        async with gate:
            return await generate(url, *call)

    return list(await asyncio.gather(*map(gated, calls)))


async def generate(url: str, adapter: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to one call."""
    where, content = urlsplit(url), json.dumps(body).encode()
    head = (
        f"POST /generate?{urlencode({'adapter': adapter})} HTTP/1.1\r\nhost: {where.netloc}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        writer.write(head.encode() + content)
        async with asyncio.timeout(120):
            told, _, answer = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    assert told.split(b" ", 2)[1] == b"200", (adapter, body, told, answer)
    given: dict[str, Any] = json.loads(answer)
    return given


def ids_of(answer: dict[str, Any]) -> list[int]:
    """The generated ids of an answer with details."""
    return [token["id"] for token in answer["details"]["tokens"]]
