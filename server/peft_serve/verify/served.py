"""What the server makes of an adapter: uploaded and asked over its own HTTP routes, inside this process.

Logits and hidden states, which no route tells whole, are read where the routes take them from.
"""

from __future__ import annotations

import asyncio
import io
import random
import tarfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

from peft_serve.adapters.records import CheckpointFiles
from peft_serve.api.app import create_app
from peft_serve.api.keyring import Keyring
from peft_serve.api.naming import BASE_NAME
from peft_serve.api.plan import Ask, Call, Purpose
from peft_serve.api.principal import ANYONE
from peft_serve.api.service import Service
from peft_serve.core import Reading
from peft_serve.engine.parts import ServerParts
from peft_serve.errors import BadRequest
from peft_serve.verify.report import Answer, Rows
from peft_serve.verify.task import Task

NAME = "verified"


async def ask(
    parts: ServerParts, files: CheckpointFiles, texts: Sequence[str], *, max_new_tokens: int, task_id: int | None = None
) -> tuple[list[Answer], list[Answer]]:
    """Answers of the adapter and of the base, all of them in flight together so that they share batches.

    Raises `BadRequest` with the server's own words when it refuses the adapter or a prompt.
    """
    async with _uploaded(parts, files) as client:
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


async def read(
    parts: ServerParts,
    files: CheckpointFiles,
    texts: Sequence[tuple[str, str | None]],
    task: Task,
    *,
    task_id: int | None = None,
) -> tuple[list[Rows], list[Rows] | None]:
    """What the adapter and the base read of texts (questions with their contexts), all of them in flight together.

    The base reads nothing for a task that it has no head for. Raises what the server refuses the adapter or a text by.
    """
    async with _uploaded(parts, files):
        pass
    admission = Service(parts, now=parts.clock, draw_bits=random.Random(0).getrandbits).open()
    base_reads = task.head is None or task.head == parts.base.head
    names = (NAME, BASE_NAME) if base_reads else (NAME,)
    asks = [
        Ask(text=text, pair=pair, is_question=task.is_question, adapter=name) for name in names for text, pair in texts
    ]
    explicit: dict[str, Any] = {"template": None} if task_id is None else {"template": None, "task_id": task_id}
    call = Call(
        asks=tuple(asks),
        explicit=explicit,
        purpose=Purpose.EMBED if task.head is None else Purpose.CLASSIFY,
        pooling=Reading.MEAN,
    )
    generations = await admission.admit(call, ANYONE)
    try:
        rows = [answer.rows for answer in await asyncio.gather(*(each.answer() for each in generations))]
    finally:
        for generation in generations:
            generation.close()
    return rows[: len(texts)], rows[len(texts) :] if base_reads else None


@asynccontextmanager
async def _uploaded(parts: ServerParts, files: CheckpointFiles) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the server that has the adapter; raises `BadRequest` where it is refused."""
    app = create_app(parts, keyring=Keyring())
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://server", timeout=600) as client,
    ):
        uploaded = await client.put(
            f"/adapters/{NAME}", content=_archive(files), headers={"content-type": "application/x-tar"}
        )
        _require(uploaded, "the adapter")
        yield client


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
