"""The application: every route over one service, and the one place where a refusal becomes a response."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from peft_serve import __version__
from peft_serve.api.access_log import AccessLog
from peft_serve.api.adapter_archive import ArchiveRoutes
from peft_serve.api.adapters import AdapterRoutes
from peft_serve.api.aliases import AliasRoutes
from peft_serve.api.chats import ChatRoutes
from peft_serve.api.classify import ClassifyRoutes
from peft_serve.api.completions import CompletionRoutes
from peft_serve.api.docs_page import PAGE
from peft_serve.api.door import Door, route_path
from peft_serve.api.embed import EmbedRoutes
from peft_serve.api.events import EventRoutes
from peft_serve.api.exchanges import Exchanges, Tracer
from peft_serve.api.fetching import FetchRoutes
from peft_serve.api.heads import Heads
from peft_serve.api.key_watch import watched_keys
from peft_serve.api.keyring import Keyring, open_keyring
from peft_serve.api.loop_lag import watched_lag
from peft_serve.api.lora_updating import LoraUpdatingRoutes
from peft_serve.api.middleware import Envelope
from peft_serve.api.native import NativeRoutes
from peft_serve.api.openapi import describe
from peft_serve.api.operations import OperationRoutes
from peft_serve.api.origins import Origins
from peft_serve.api.problems import Problem, family_of, problem_of, problem_of_http, response_of
from peft_serve.api.root import RootRoutes
from peft_serve.api.route_needs import RouteNeeds
from peft_serve.api.service import Service
from peft_serve.api.tgi import TGIRoutes
from peft_serve.api.turnstile import Turnstile
from peft_serve.api.ui import PlaygroundRoutes
from peft_serve.engine.parts import ServerParts
from peft_serve.engine.resuming import resume_beside
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
    keyring: Keyring | None = None,
) -> FastAPI:
    """The application over a server's parts. `now` gives unix seconds; `draw_bits(n)` gives n random bits, for
    ids and for the seeds of requests that bring none (default: the system's source). It closes the `tracer`. The
    `keyring` is the one that the settings name, unless given."""
    service = Service(parts, now=now, draw_bits=draw_bits or random.SystemRandom().getrandbits)
    keys = open_keyring(parts.settings) if keyring is None else keyring
    keys.on_read = parts.metrics.tenants.set_file_ok

    app = FastAPI(
        title="peft-serve",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=_lifespan(service, keys, tracer),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_routes(app, service)
    _add_layers(app, service, keys)
    app.add_middleware(
        Exchanges,
        log=AccessLog(with_client=parts.settings.log_client_address),
        tracer=tracer,
        now=now,
        clock=parts.clock,
    )
    _describe_once(app)
    return app


def _lifespan(
    service: Service, keys: Keyring, tracer: Tracer | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """What runs beside the requests, from the first to the last."""
    parts = service.parts

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.open()
        service.intake.start()
        resume_beside(parts.catalog, parts.engine)
        if parts.follower is not None:
            parts.follower.start()
        async with watched_lag(parts.metrics.observe_loop_lag), watched_keys(keys):
            yield
        if parts.follower is not None:
            parts.follower.stop()
        service.intake.close()
        if parts.templates is not None:
            parts.templates.close()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)

    return lifespan


def _add_routes(app: FastAPI, service: Service) -> None:
    families = (
        NativeRoutes, RootRoutes, TGIRoutes, ClassifyRoutes, EmbedRoutes, CompletionRoutes, ChatRoutes, AdapterRoutes,
        AliasRoutes, ArchiveRoutes, OperationRoutes, EventRoutes, PlaygroundRoutes, FetchRoutes, LoraUpdatingRoutes,
    )  # fmt: skip
    for family in families:
        app.include_router(family(service).router())
    app.add_api_route("/docs", _docs, methods=["GET"], include_in_schema=False)
    app.add_exception_handler(ServeError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse)


def _add_layers(app: FastAPI, service: Service, keys: Keyring) -> None:
    """What a request goes through before a route: the one that is added last is the first to see it."""
    settings, metrics = service.parts.settings, service.parts.metrics
    app.state.route_needs = RouteNeeds()
    app.add_middleware(
        Door,
        keyring=keys,
        origins=Origins(settings.allowed_origins, settings.allowed_hosts, is_open=keys.is_open),
        quotas=service.quotas,
        figures=metrics.tenants,
        needs=app.state.route_needs,
        metrics_is_public=settings.metrics_public,
    )
    app.add_middleware(Heads)
    app.add_middleware(
        Envelope,
        max_body_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_adapter_bytes,
        body_s=settings.body_timeout_s,
        new_id=service.new_id,
    )
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[each.rstrip("/") for each in settings.allowed_origins],
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(Turnstile, clock=service.parts.clock)


async def _docs() -> Response:
    return HTMLResponse(PAGE)


async def _refuse(request: Request, error: Exception) -> Response:
    family = family_of(request.url.path)
    problem = _problem(request, error)
    request.state.error = problem.code
    return response_of(problem, family, request.scope["state"].get("request_id"))


def _problem(request: Request, error: Exception) -> Problem:
    if isinstance(error, HTTPException):
        return problem_of_http(error, methods=_methods(request) if error.status_code == 405 else frozenset())
    if not isinstance(error, ServeError):
        error = InvalidParameter("the address has a field of the wrong type; /docs shows the types")
    return problem_of(error, family_of(request.url.path))


def _methods(request: Request) -> frozenset[str]:
    """The methods of the address, where this request's is none of them: the router names those of one route."""
    needs: RouteNeeds = request.app.state.route_needs
    methods = needs.methods(route_path(request.scope))
    return frozenset() if request.method in methods else methods


def _describe_once(app: FastAPI) -> None:
    """The OpenAPI document is made when it is first asked for, with the bodies that routes read themselves."""

    def openapi() -> dict[str, object]:
        if app.openapi_schema is None:
            app.openapi_schema = describe(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way
