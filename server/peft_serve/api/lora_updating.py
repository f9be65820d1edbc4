"""vLLM's pair of routes for adapters at run time: `POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`.

Bodies, statuses and words are vLLM's, so that what drives it drives this server. A path is a source like any other: it
is loaded where `--allow-source` allows it, and becomes a version of its name. Off unless the operator switches it on.
"""

from __future__ import annotations

import asyncio
import re
from http import HTTPStatus
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from peft_serve.adapters.names import shown
from peft_serve.api.fetching import read_small
from peft_serve.api.json_body import parse_object
from peft_serve.api.json_response import json_response
from peft_serve.api.openapi import openai_error_responses
from peft_serve.api.principal import principal_of
from peft_serve.api.problems import Family, problem_of
from peft_serve.api.service import Service
from peft_serve.errors import Forbidden, InvalidParameter, PreconditionFailed, ServeError, UnknownAdapter

_REPO: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.%-]+)?")
_TYPES: Final = {400: "BadRequestError", 403: "PermissionDeniedError", 404: "NotFoundError"}


class LoraUpdatingRoutes:
    """See the module's docstring."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._threads = service.store_threads
        self._parts = service.parts

    def router(self) -> APIRouter:
        router = APIRouter(tags=["openai"])
        add = router.add_api_route
        refusals = openai_error_responses(400, 403, 404, 503)
        add(
            "/v1/load_lora_adapter",
            self.load,
            methods=["POST"],
            summary="Load an adapter from an allowed source, as vLLM does",
            openapi_extra=_body("lora_name", "lora_path"),
            responses=refusals,
        )
        add(
            "/v1/unload_lora_adapter",
            self.unload,
            methods=["POST"],
            summary="Delete an adapter, as vLLM does",
            openapi_extra=_body("lora_name"),
            responses=refusals,
        )
        return router

    async def load(self, request: Request) -> Response:
        try:
            self._check_allowed()
            body = parse_object(await read_small(request))
            name, path = _text(body, "lora_name"), _text(body, "lora_path")
            if not name or not path:
                return _refused("Both 'lora_name' and 'lora_path' must be provided.", "InvalidUserInput")
            is_inplace = body.get("load_inplace") is True
            principal = principal_of(request)
            principal.require_reach(name)
            if not is_inplace and await self._threads.run(self._is_there, name):
                return _already_loaded(name)
            self._service.open()
            job = self._service.intake.fetch(
                name, _source_of(path), create_only=not is_inplace, publisher=principal.publisher
            )
            await asyncio.wrap_future(job.ended)
        except PreconditionFailed:
            return _already_loaded(name)
        except ServeError as error:
            return _answer(error)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        try:
            self._check_allowed()
            body = parse_object(await read_small(request))
            name = _text(body, "lora_name")
            if not name:
                return _refused("'lora_name' needs to be provided to unload a LoRA adapter.", "InvalidUserInput")
            await self._threads.run(self._service.seen(request).require_own, name)
            publisher = principal_of(request).publisher
            await self._threads.run(self._service.intake.remove, name, publisher=publisher)
        except UnknownAdapter:
            return _refused(f"The lora adapter {shown(name)} cannot be found.", "NotFoundError", HTTPStatus.NOT_FOUND)
        except ServeError as error:
            return _answer(error)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    def _check_allowed(self) -> None:
        if not self._parts.settings.allow_runtime_lora_updating:
            raise Forbidden(
                "adapters are not loaded and unloaded by this route; the operator may start the server with "
                "--allow-runtime-lora-updating, and PUT /adapters/{name} uploads one without it"
            )

    def _is_there(self, name: str) -> bool:
        try:
            self._parts.catalog.get(name)
        except UnknownAdapter:
            return False
        return True


def _source_of(path: str) -> str:
    """vLLM's path as a source: a folder, or a repository of the hub; a source as it is."""
    if path.startswith("/"):
        return f"file:{path}"
    return f"hf://{path}" if _REPO.fullmatch(path) else path


def _text(body: dict[str, Any], field: str) -> str:
    value = body.get(field)
    if value is not None and not isinstance(value, str):
        raise InvalidParameter(f"{field}: a string is needed", param=field)
    return value or ""


def _already_loaded(name: str) -> Response:
    return _refused(
        f"The lora adapter {shown(name)} has already been loaded. If you want to load the adapter in place, set "
        "'load_inplace' to True.",
        "InvalidUserInput",
    )


def _answer(error: ServeError) -> Response:
    problem = problem_of(error, Family.OPENAI)
    default = "BadRequestError" if problem.status < 500 else "InternalServerError"
    kind = _TYPES.get(problem.status, default)
    return _refused(problem.message, kind, HTTPStatus(problem.status), headers=dict(problem.headers or {}))


def _refused(
    message: str, kind: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST, headers: dict[str, str] | None = None
) -> Response:
    content = {"error": {"message": message, "type": kind, "param": None, "code": status.value}}
    return json_response(content, status=status.value, headers=headers)


def _body(*required: str) -> dict[str, Any]:
    fields = ("lora_name", "lora_path") if len(required) > 1 else ("lora_name",)
    properties: dict[str, Any] = {field: {"type": "string"} for field in fields}
    if len(required) > 1:
        properties["load_inplace"] = {"type": "boolean", "default": False}
    else:
        properties["lora_int_id"] = {"type": ["integer", "null"]}
    schema = {"type": "object", "required": list(required), "properties": properties}
    example = dict(zip(fields, ("sql", "/srv/adapters/sql"), strict=False))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}}
