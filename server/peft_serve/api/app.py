"""The application: every route over one service, and the one place where a refusal becomes a response."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from peft_serve import __version__
from peft_serve.api.access_log import AccessLog
from peft_serve.api.adapter_archive import ArchiveRoutes
from peft_serve.api.adapters import AdapterRoutes
from peft_serve.api.chats import ChatRoutes
from peft_serve.api.classify import ClassifyRoutes
from peft_serve.api.completions import CompletionRoutes
from peft_serve.api.docs_page import PAGE
from peft_serve.api.embed import EmbedRoutes
from peft_serve.api.events import EventRoutes
from peft_serve.api.exchanges import Exchanges, Tracer
from peft_serve.api.fetching import FetchRoutes
from peft_serve.api.loop_lag import watched_lag
from peft_serve.api.lora_updating import LoraUpdatingRoutes
from peft_serve.api.middleware import Envelope
from peft_serve.api.native import NativeRoutes
from peft_serve.api.openapi import describe
from peft_serve.api.operations import OperationRoutes
from peft_serve.api.problems import Problem, family_of, problem_of, problem_of_http, response_of
from peft_serve.api.root import RootRoutes
from peft_serve.api.service import Service
from peft_serve.api.tgi import TGIRoutes
from peft_serve.api.ui import PlaygroundRoutes
from peft_serve.engine.parts import ServerParts
from peft_serve.errors import InvalidParameter, ServeError

_DESCRIPTION = (
    "One resident base model, many PEFT adapters in one batch. Name an adapter by `?adapter=`, the header "
    "`X-Adapter`, the body, or OpenAI's `model`; without a name the base answers. `a+b` and `a:0.7+b:0.3` combine "
    "adapters in one request, and `ensemble` lets several answer it."
)


def create_app(
    parts: ServerParts,
    *,
    now: Callable[[], float] = time.time,
    draw_bits: Callable[[int], int] | None = None,
    tracer: Tracer | None = None,
) -> FastAPI:
    """The application over a server's parts. `now` gives unix seconds; `draw_bits(n)` gives n random bits, for
    ids and for the seeds of requests that bring none (default: the system's source). It closes the `tracer`."""
    service = Service(parts, now=now, draw_bits=draw_bits or random.SystemRandom().getrandbits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.open()
        service.intake.start()
        async with watched_lag(parts.metrics.observe_loop_lag):
            yield
        service.intake.close()
        if parts.templates is not None:
            parts.templates.close()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)

    app = FastAPI(
        title="peft-serve",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    families = (
        NativeRoutes, RootRoutes, TGIRoutes, ClassifyRoutes, EmbedRoutes, CompletionRoutes, ChatRoutes, AdapterRoutes,
        ArchiveRoutes, OperationRoutes, EventRoutes, PlaygroundRoutes, FetchRoutes, LoraUpdatingRoutes,
    )  # fmt: skip
    for family in families:
        app.include_router(family(service).router())
    app.add_api_route("/docs", _docs, methods=["GET"], include_in_schema=False)
    app.add_exception_handler(ServeError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_middleware(
        Envelope,
        max_body_bytes=parts.settings.max_body_bytes,
        max_upload_bytes=parts.settings.max_adapter_bytes,
        new_id=service.new_id,
    )
    app.add_middleware(
        Exchanges,
        log=AccessLog(with_client=parts.settings.log_client_address),
        tracer=tracer,
        now=now,
        clock=parts.clock,
    )
    _describe_once(app)
    return app


async def _docs() -> Response:
    return HTMLResponse(PAGE)


async def _refuse(request: Request, error: Exception) -> Response:
    family = family_of(request.url.path)
    problem = _problem(request, error)
    request.state.error = problem.code
    return response_of(problem, family, request.scope["state"].get("request_id"))


def _problem(request: Request, error: Exception) -> Problem:
    if isinstance(error, HTTPException):
        return problem_of_http(error)
    if not isinstance(error, ServeError):
        error = InvalidParameter("the address has a field of the wrong type; /docs shows the types")
    return problem_of(error, family_of(request.url.path))


def _describe_once(app: FastAPI) -> None:
    """The OpenAPI document is made when it is first asked for, with the bodies that routes read themselves."""

    def openapi() -> dict[str, object]:
        if app.openapi_schema is None:
            app.openapi_schema = describe(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way
