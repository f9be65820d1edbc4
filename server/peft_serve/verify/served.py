"""What the server makes of an adapter: asked over its own HTTP routes, inside this process."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import Sequence
from typing import Any

import httpx

from peft_serve.adapters.records import CheckpointFiles
from peft_serve.api.app import create_app
from peft_serve.engine.parts import ServerParts
from peft_serve.errors import BadRequest
from peft_serve.verify.report import Answer

NAME = "verified"


async def ask(
    parts: ServerParts, files: CheckpointFiles, texts: Sequence[str], *, max_new_tokens: int, task_id: int | None = None
) -> tuple[list[Answer], list[Answer]]:
    """Answers of the adapter and of the base, all of them in flight together so that they share batches.

    Raises `BadRequest` with the server's own words when it refuses the adapter or a prompt.
    """
    app = create_app(parts)
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://server", timeout=600) as client,
    ):
        uploaded = await client.put(
            f"/adapters/{NAME}", content=_archive(files), headers={"content-type": "application/x-tar"}
        )
        _require(uploaded, "the adapter")
        parameters = {"max_new_tokens": max_new_tokens, "details": True, "template": None, "choices": None}
        body = {"inputs": list(texts), "parameters": parameters}
        task = {} if task_id is None else {"task_id": str(task_id)}
        given, plain = await asyncio.gather(
            client.post("/generate", params={"adapter": NAME, **task}, json=body),
            client.post("/generate", json=body),
        )
        _require(given, "a prompt")
        _require(plain, "a prompt")
    return [_answer(each) for each in given.json()], [_answer(each) for each in plain.json()]


def _require(response: httpx.Response, what: str) -> None:
    if response.status_code >= 400:
        body: Any = response.json()
        reasons = "; ".join(f"{e['path']} {e['reason']}" for e in body.get("errors", []))
        raise BadRequest(f"the server refuses {what}: {body.get('detail') or response.text} {reasons}".strip())


def _answer(body: dict[str, Any]) -> Answer:
    tokens = body["details"]["tokens"]
    return Answer(tokens=tuple(t["id"] for t in tokens), logprobs=tuple(t["logprob"] for t in tokens))


def _archive(files: CheckpointFiles) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.contents().items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
