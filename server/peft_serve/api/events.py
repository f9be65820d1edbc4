"""`GET /v1/events`: what the server is doing, twice a second, for people who watch."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from peft_serve.api.beat import Beat
from peft_serve.api.openapi import openai_error_responses
from peft_serve.api.principal import principal_of
from peft_serve.api.service import Service
from peft_serve.api.sse import EventStreamResponse


class EventRoutes:
    """See the module's docstring."""

    def __init__(self, service: Service) -> None:
        self._beat = Beat(service)
        self._keep_alive_s = service.parts.settings.keep_alive_s

    def router(self) -> APIRouter:
        router = APIRouter(tags=["operations"])
        router.add_api_route(
            "/v1/events",
            self.events,
            methods=["GET"],
            summary="Queue, batch rows, adapter slots and rates as server-sent events, twice a second",
            responses=openai_error_responses(429),
        )
        return router

    async def events(self, request: Request) -> Response:
        events = self._beat.join(principal_of(request))
        return EventStreamResponse(events, on_close=self._beat.leave, keep_alive_s=self._keep_alive_s)
