"""`POST /`: what clients call that know no path. A generative base generates; any other labels, or embeds.

Hub clients send the body of their task here. Which task that is shows in the fields, and in what can answer.
"""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from peft_serve.api.abilities import NothingToClassify, generates
from peft_serve.api.classify import ClassifyRoutes
from peft_serve.api.embed import EmbedRoutes
from peft_serve.api.json_body import read_object
from peft_serve.api.native import NativeRoutes
from peft_serve.api.openapi import error_responses, json_body
from peft_serve.api.service import Service

_OF_EMBED: Final = frozenset({"normalize", "truncate", "pooling", "prompt_name", "truncation_direction"})
"""Fields that hub clients put beside the inputs when they ask for an embedding."""


class RootRoutes:
    """See the module's docstring."""

    def __init__(self, service: Service) -> None:
        self._base = service.parts.base
        self._native = NativeRoutes(service)
        self._classify = ClassifyRoutes(service)
        self._embed = EmbedRoutes(service)

    def router(self) -> APIRouter:
        router = APIRouter(tags=["generate"])
        router.add_api_route(
            "/",
            self.root,
            methods=["POST"],
            summary="As /generate, with a list for an answer; on a base that generates nothing, as /classify or /embed",
            openapi_extra=json_body("GenerateBody", {"inputs": "Where is my order?"}, has_adapter=True),
            responses=error_responses(400, 404, 413, 415, 422, 429, 500, 503),
        )
        return router

    async def root(self, request: Request) -> Response:
        if generates(self._base):
            return await self._native.compat_generate(request)
        body = await read_object(request)
        if _OF_EMBED.isdisjoint(body):
            try:
                return await self._classify.answer(body, request)
            except NothingToClassify:
                pass
        return await self._embed.answer(body, request)
