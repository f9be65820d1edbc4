"""`POST /adapters {"name", "source"}` and `GET /adapters/jobs/{id}`: adapters that the server fetches by itself.

Knows the bodies and the statuses. What may be fetched, and how, is the intake's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response

from peft_serve.adapters.sources.jobs import JobView, no_such_job
from peft_serve.api.adapter_views import published_view
from peft_serve.api.fields import FieldRules
from peft_serve.api.json_body import parse_object, validated
from peft_serve.api.json_response import json_response
from peft_serve.api.openapi import error_responses
from peft_serve.api.principal import principal_of
from peft_serve.api.problems import Family, body_of, problem_of
from peft_serve.api.service import Service
from peft_serve.errors import BadRequest, PayloadTooLarge

MAX_BODY_BYTES: Final = 64 * 1024
_RULES: Final = FieldRules()


class FetchBody(BaseModel):
    """What to fetch, and the name that is to stand for it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    source: str


_EXAMPLE: Final = {"name": "sql", "source": "hf://my-org/sql-lora@v2"}


def or_source(upload: Mapping[str, Any]) -> dict[str, Any]:
    """The `openapi_extra` of a route that takes an upload, or in its place a source to fetch."""
    body = upload["requestBody"]
    schema = {
        "type": "object",
        "required": ["name", "source"],
        "properties": {key: {"type": "string"} for key in _EXAMPLE},
    }
    content = body["content"] | {"application/json": {"schema": schema, "example": _EXAMPLE}}
    return {**upload, "requestBody": {**body, "content": content}}


class FetchRoutes:
    """See the module's docstring."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def router(self) -> APIRouter:
        router = APIRouter(tags=["adapters"])
        router.add_api_route(
            "/adapters/jobs/{id}",
            self.job,
            methods=["GET"],
            summary="How far the fetch of an adapter is",
            responses=error_responses(404),
        )
        return router

    async def job(self, id: str, request: Request) -> Response:  # the address's own word
        job = self._service.intake.job(id)
        if not principal_of(request).sees(job.name):
            raise no_such_job()
        return json_response(job_view(job.view()))

    async def create(self, request: Request, *, create_only: bool) -> Response:
        """Begin to fetch what the body names."""
        if "dry_run" in request.query_params:
            raise BadRequest("dry_run: is for the files themselves; /adapters/validate checks them", param="dry_run")
        if "if-match" in request.headers:
            raise BadRequest("if-match: is for the files themselves; leave it out of a fetch", param="if-match")
        body = validated(FetchBody, parse_object(await read_small(request)), _RULES)
        self._service.open()
        principal = principal_of(request)
        principal.require_reach(body.name)
        job = self._service.intake.fetch(body.name, body.source, create_only=create_only, publisher=principal.publisher)
        return json_response(job_view(job.view()), status=202, headers={"location": f"/adapters/jobs/{job.id}"})


async def read_small(request: Request) -> bytes:
    """The body, which may be that of a route with large ones; raises PayloadTooLarge."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise PayloadTooLarge(f"body: more than {MAX_BODY_BYTES} bytes, the largest that is no upload")
    return bytes(content)


def job_view(job: JobView) -> dict[str, Any]:
    """A job as it is told to callers: where it stands, and what came of it."""
    error = None
    if job.error is not None:
        error = body_of(problem_of(job.error, Family.NATIVE), Family.NATIVE)
    return {
        "id": job.id,
        "name": job.name,
        "source": job.source,
        "state": job.state.value,
        "bytes": job.num_bytes,
        "total_bytes": job.total_bytes,
        "error": error,
        "adapter": None if job.published is None else published_view(job.published),
        "outcome": None if job.published is None else "created" if job.published.created else "unchanged",
    }
