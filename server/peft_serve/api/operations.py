"""`/`, `/health`, `/livez`, `/readyz`, `/metrics` and the model list: what is asked about the server itself.

None of them waits for anything but the metrics page, and that only for a render.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from peft_serve.adapters.listing import Entry
from peft_serve.api import openai_words as words
from peft_serve.api.abilities import labels_of, reads, tasks_of
from peft_serve.api.adapter_views import head_view
from peft_serve.api.json_response import json_response
from peft_serve.api.metrics_view import seen_page
from peft_serve.api.naming import MODEL_ALIASES
from peft_serve.api.openapi import error_responses, openai_error_responses
from peft_serve.api.principal import principal_of
from peft_serve.api.service import Service
from peft_serve.api.store_threads import StoreThreads
from peft_serve.api.ui import moved
from peft_serve.core import BASE
from peft_serve.engine.snapshot import EngineSnapshot, EngineState
from peft_serve.errors import AdapterInvalid, AdapterUnavailable, Unavailable
from peft_serve.gateway_figures import LoadedAdapter
from peft_serve.metrics import CONTENT_TYPE, StateFigures

MAX_STALL_S: Final = 60.0
RETRY_AFTER_S: Final = 1.0

_SIGNPOST: Final = {
    "ask": "POST /",  # what the base does: it generates, labels or embeds
    "models": "GET /v1/models",
    "adapters": "GET /adapters",
    "docs": "GET /docs",
    "openapi": "GET /openapi.json",
    "playground": "GET /ui/",
}


class OperationRoutes:
    """See the module's docstring."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._threads = service.store_threads
        self._render_threads = StoreThreads(num_threads=1, name="metrics")
        self._parts = service.parts

    def router(self) -> APIRouter:
        router = APIRouter()
        add = router.add_api_route
        ops: list[str | Enum] = ["operations"]
        unavailable = error_responses(503)
        add(
            "/",
            self.root,
            methods=["GET"],
            tags=ops,
            summary="As /health, with where to go on; a browser is sent to /ui/",
            responses=unavailable,
        )
        add("/livez", self.livez, methods=["GET"], tags=ops, summary="The process answers")
        add("/health", self.health, methods=["GET"], tags=ops, summary="The engine lives", responses=unavailable)
        add("/readyz", self.readyz, methods=["GET"], tags=ops, summary="Requests are admitted", responses=unavailable)
        add("/metrics", self.metrics, methods=["GET"], tags=ops, summary="Prometheus' text format, version 0.0.4")
        add(
            "/metrics/gateway",
            self.gateway_metrics,
            methods=["GET"],
            tags=ops,
            summary="Of /metrics what endpoint pickers read",
        )
        add("/v1/models", self.models, methods=["GET"], tags=["openai"], summary="The base and every adapter")
        add(
            "/v1/models/{model:path}",
            self.model,
            methods=["GET"],
            tags=["openai"],
            summary="The base or one adapter",
            responses=openai_error_responses(404),
        )
        return router

    async def root(self, request: Request) -> Response:
        """Whoever was given nothing but the server's address: a person at a browser finds the page, a person at a
        terminal the others, and a probe what TGI's `GET /` tells, whether the server is well."""
        if "text/html" in request.headers.get("accept", ""):
            return moved()
        return json_response(self._health() | {"routes": _SIGNPOST})

    async def livez(self) -> Response:
        return json_response({"status": "ok"})

    async def health(self) -> Response:
        return json_response(self._health())

    def _health(self) -> dict[str, object]:
        snapshot = self._parts.engine.snapshot()
        if snapshot.state in (EngineState.DEAD, EngineState.STOPPED):
            raise Unavailable(f"the engine is {snapshot.state.value}; the server must be restarted")
        if snapshot.stalled_s > MAX_STALL_S:
            raise Unavailable(f"the engine has been in one step for {snapshot.stalled_s:.0f} s")
        return {"status": "ok", "state": snapshot.state.value}

    async def readyz(self) -> Response:
        state = self._parts.engine.snapshot().state
        if state is not EngineState.RUNNING:
            raise Unavailable(f"the server is {state.value}", retry_after_s=RETRY_AFTER_S)
        return json_response({"status": "ok", "state": state.value})

    async def metrics(self, request: Request) -> Response:
        return await self._page(self._parts.metrics.render, request)

    async def gateway_metrics(self, request: Request) -> Response:
        return await self._page(self._parts.metrics.render_for_gateways, request)

    async def _page(self, render: Callable[[], bytes], request: Request) -> Response:
        self._parts.metrics.set_state(self._figures(self._parts.engine.snapshot()))
        page = await asyncio.wrap_future(self._render_threads.submit(render))
        if not self._parts.settings.metrics_public:
            page = seen_page(page, principal_of(request))
        # starlette would add a charset of its own, and scrapers compare the type as a whole.
        return Response(page, headers={"content-type": CONTENT_TYPE})

    def _figures(self, snapshot: EngineSnapshot) -> StateFigures:
        name = self._service.name_of
        return StateFigures(
            now_s=self._service.now(),
            num_running=snapshot.num_running,
            num_waiting=snapshot.num_waiting,
            resident_adapters=tuple(name(r.adapter) for r in snapshot.resident),  # one for each slot that is taken
            waiting_adapters=tuple(name(adapter) for adapter in snapshot.waiting_adapters if adapter != BASE),
            host_adapters=tuple(dict.fromkeys(name(adapter) for adapter in snapshot.host_adapters)),
            loaded=tuple(self._loaded(snapshot)),
            device_bytes=snapshot.device_bytes,
            host_bytes=snapshot.host_bytes,
            kv_usage=snapshot.kv_usage,
            step_time=snapshot.step_time,
            max_resident=snapshot.num_slots,
            num_blocks=snapshot.num_blocks,
            block_size=snapshot.block_size,
            engine_state=snapshot.state.value,
            stalled_s=snapshot.stalled_s,
        )

    def _loaded(self, snapshot: EngineSnapshot) -> Iterator[LoadedAdapter]:
        on_device = {resident.adapter for resident in snapshot.resident}
        for adapter in (*snapshot.host_adapters, *on_device):
            for name in self._service.names_of(adapter):
                yield LoadedAdapter(name=name, is_on_device=adapter in on_device, is_pinned=adapter in snapshot.pinned)

    async def models(self, request: Request) -> Response:
        base = self._parts.base
        entries = await self._threads.run(self._service.seen(request).list)
        cards = [self._adapter_card(entry) for entry in entries if not entry.problem]
        aliases = await self._threads.run(self._service.seen(request).aliases)
        cards += [self._card(alias.name, parent=base.name) for alias in aliases]
        return json_response({"object": "list", "data": [self._base_card(), *cards]})

    async def model(self, model: str, request: Request) -> Response:
        base = self._parts.base
        if model == base.name or model in MODEL_ALIASES:
            return json_response(self._base_card())
        if await self._threads.run(self._service.seen(request).find_alias, model) is not None:
            return json_response(self._card(model, parent=base.name))
        entry = await self._threads.run(self._service.seen(request).get, model)
        return json_response(self._adapter_card(entry) | await self._threads.run(self._adapter_words, model))

    def _base_card(self) -> dict[str, object]:
        base = self._parts.base
        return self._card(base.name) | {
            "tasks": tasks_of(base, None),
            "head": head_view(base.head),
            "labels": list(base.labels) or None,
        }

    def _adapter_card(self, entry: Entry) -> dict[str, object]:
        """What the list tells: a folder's checkpoint that nobody has used yet is not read for it."""
        base = self._parts.base
        summary = None if entry.version is None else entry.version.summary
        head = None if summary is None else summary.head
        return self._card(entry.name, parent=base.name) | {"tasks": tasks_of(base, head), "head": head_view(head)}

    def _adapter_words(self, name: str) -> dict[str, object]:
        """What one adapter is asked by and answers with; nothing of one that cannot be used."""
        base = self._parts.base
        try:
            resolved = self._parts.catalog.resolve(name)
        except (AdapterUnavailable, AdapterInvalid):
            return {}
        profile, head = resolved.profile, resolved.head
        answering = (head or base.head) if reads(base) else None
        labels = labels_of(base, answering, profile) if answering else tuple(profile.choices or ())
        return {
            "tasks": tasks_of(base, head, has_choices=bool(profile.choices)),
            "head": head_view(head),
            "labels": list(labels) or None,
            "num_tasks": resolved.num_tasks,
        }

    def _card(self, name: str, parent: str | None = None) -> dict[str, object]:
        created, longest = int(self._service.started_s), self._parts.base.max_context
        return words.model_card(name, created=created, max_model_len=longest, parent=parent)
