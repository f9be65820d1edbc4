"""`POST /embed` and `/v1/embeddings`: a text's last hidden states as one vector."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from peft_serve.api import fields
from peft_serve.api.json_body import read_object, validated
from peft_serve.api.json_response import json_response
from peft_serve.api.labels import checked_rows
from peft_serve.api.naming import (
    BASE_NAME,
    Mention,
    agreed_name,
    agreed_task,
    mentions_of,
    model_mention,
    named_adapters,
)
from peft_serve.api.openapi import error_responses, json_body, openai_error_responses
from peft_serve.api.plan import Answer, Ask, Call, Purpose, Style
from peft_serve.api.principal import principal_of
from peft_serve.api.reading_bodies import EmbedBody, EmbeddingsBody, EmbedParameters
from peft_serve.api.replies import CLIENT_CLOSED, whole, whole_headers
from peft_serve.api.service import Service
from peft_serve.api.splitting import session_of
from peft_serve.api.waiting import max_wait_of
from peft_serve.core import Reading
from peft_serve.errors import InvalidParameter

_SAID: Final = ("pooling", "normalize", "truncate", "template", "adapter_id", "task_id")


class EmbedRoutes:
    """See the module's docstring."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._base = service.parts.base

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route(
            "/embed",
            self.embed,
            methods=["POST"],
            tags=["embed"],
            summary="Vectors of texts, with the adapter's edits",
            openapi_extra=json_body("EmbedBody", _EXAMPLE, has_adapter=True),
            responses=error_responses(400, 404, 413, 415, 422, 429, 500, 503),
        )
        router.add_api_route(
            "/v1/embeddings",
            self.embeddings,
            methods=["POST"],
            tags=["openai"],
            summary="Vectors of a text, a list of texts, or token ids",
            openapi_extra=json_body("EmbeddingsBody", _OPENAI_EXAMPLE, has_adapter=True),
            responses=openai_error_responses(400, 404, 413, 415, 429, 500, 503),
        )
        return router

    async def embed(self, request: Request) -> Response:
        return await self.answer(await read_object(request), request)

    async def answer(self, body: dict[str, Any], request: Request) -> Response:
        """The answer to a body of `/embed` that has been read."""
        read = validated(EmbedBody, body, fields.EMBED)
        said = _said(read)
        inputs = [read.inputs] if isinstance(read.inputs, str) else read.inputs
        names = named_adapters(
            request,
            [Mention("adapter_id", said.get("adapter_id") or "")],
            read.adapter,
            read.model,
            num_inputs=len(inputs),
            base_name=self._base.name,
        )
        asks = [Ask(text=text, adapter=name) for text, name in zip(inputs, names, strict=True)]
        call = _call(asks, said, agreed_task(request, said.get("task_id")), Style())
        generations = await self._service.open().admit(
            call, principal_of(request), max_wait_s=max_wait_of(request), session=session_of(request)
        )
        answers = await whole(generations, request)
        if answers is None:
            return Response(status_code=CLIENT_CLOSED)
        vectors = [_vector(answer, is_unit=bool(said.get("normalize"))) for answer in answers]
        # Nobody but LoRAX' client says `stream` here, and it reads the vector of its one text from an object.
        content: Any = {"embeddings": vectors[0]} if "stream" in body and isinstance(read.inputs, str) else vectors
        return json_response(content, headers=whole_headers(generations, answers))

    async def embeddings(self, request: Request) -> Response:
        body = validated(EmbeddingsBody, await read_object(request), fields.EMBEDDINGS)
        base = self._base.name
        mentions = (
            *mentions_of(request),
            Mention("adapter_id", body.adapter_id or ""),
            *model_mention(body.model, base),
        )
        adapter = agreed_name(mentions, base)
        said = _fields(body)
        style = Style(names={"inputs": "input"})
        call = _call(_asks(body, adapter), said, agreed_task(request, body.task_id), style)
        generations = await self._service.open().admit(
            call, principal_of(request), max_wait_s=max_wait_of(request), session=session_of(request)
        )
        answers = await whole(generations, request)
        if answers is None:
            return Response(status_code=CLIENT_CLOSED)
        vectors = [_vector(answer, is_unit=bool(body.normalize)) for answer in answers]
        if body.dimensions not in (None, len(vectors[0])):
            raise InvalidParameter(
                f"dimensions: {body.dimensions}; the vectors of {base} have {len(vectors[0])}; leave it out",
                param="dimensions",
            )
        num_tokens = sum(answer.num_prompt_tokens for answer in answers)
        content = {
            "object": "list",
            "data": [_datum(i, vector, body.encoding_format) for i, vector in enumerate(vectors)],
            "model": base if adapter == BASE_NAME else adapter,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
        return json_response(content, headers=whole_headers(generations, answers))


def _fields(body: EmbedBody | EmbeddingsBody) -> dict[str, Any]:
    return {name: getattr(body, name) for name in _SAID if name in body.model_fields_set}


def _said(body: EmbedBody) -> dict[str, Any]:
    """What stands in `parameters` and what stands beside the inputs, as one; raises InvalidParameter if they differ."""
    parameters = validated(EmbedParameters, body.parameters, fields.EMBED, path="parameters.")
    said = _fields(body)
    for name, value in parameters.model_dump(exclude_unset=True).items():
        if said.get(name, value) != value:
            raise InvalidParameter(f"{name}: differs from parameters.{name}; send one of them", param=name)
        said[name] = value
    return said


def _call(asks: Sequence[Ask], said: dict[str, Any], task: dict[str, int], style: Style) -> Call:
    return Call(
        asks=tuple(asks),
        explicit={name: said[name] for name in ("template",) if name in said} | task,
        style=style,
        purpose=Purpose.EMBED,
        pooling=Reading(said.get("pooling") or Reading.MEAN),
        cuts=bool(said.get("truncate")),
    )


def _asks(body: EmbeddingsBody, adapter: str) -> list[Ask]:
    given: Any = body.input
    inputs = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    return [
        Ask(text=each, adapter=adapter) if isinstance(each, str) else Ask(ids=tuple(each), adapter=adapter)
        for each in inputs
    ]


def _vector(answer: Answer, *, is_unit: bool) -> list[float]:
    (row,) = checked_rows(answer.rows, 1)
    if not is_unit:
        return list(row)
    length = math.hypot(*row)
    return [value / length for value in row] if length else list(row)


def _datum(index: int, vector: Sequence[float], encoding_format: str) -> dict[str, Any]:
    """One vector as OpenAI tells it; base64 is of little-endian float32."""
    embedding: Any = vector
    if encoding_format == "base64":
        embedding = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return {"object": "embedding", "index": index, "embedding": embedding}


_EXAMPLE: Final = {"inputs": ["Where is my order?", "It was due on Monday."], "normalize": True}
_OPENAI_EXAMPLE: Final = {"model": "base", "input": "Where is my order?"}
