"""`/adapters`: upload, list, delete, roll back, and move adapters between disk and device.

Knows HTTP's preconditions and statuses; what a name stands for is the catalog's business.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from peft_serve.adapters.changes import Published, etag
from peft_serve.adapters.listing import Entry
from peft_serve.adapters.members import UploadLimits
from peft_serve.adapters.names import check_name
from peft_serve.api.adapter_views import entry_view, published_view, summary_view, version_view
from peft_serve.api.aliases import alias_view
from peft_serve.api.fetching import FetchRoutes, or_source, read_small
from peft_serve.api.json_body import parse_object
from peft_serve.api.json_response import json_response
from peft_serve.api.openapi import UPLOAD_BODY, error_responses
from peft_serve.api.principal import principal_of
from peft_serve.api.seen_catalog import SeenCatalog
from peft_serve.api.service import Service
from peft_serve.api.uploads import Upload, receive_upload
from peft_serve.core import AdapterId
from peft_serve.errors import (
    AdapterInvalid,
    AdapterUnavailable,
    BadRequest,
    InvalidParameter,
    NotFound,
    PreconditionFailed,
    ServeError,
    UnknownAdapter,
)

MAX_UPLOADS: Final = 2
"""Uploads that are unpacked and checked at the same time; others wait."""


class AdapterRoutes:
    """See the module's docstring."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._threads = service.store_threads
        self._parts = service.parts
        self._limits = UploadLimits(max_bytes=service.parts.settings.max_adapter_bytes)
        self._turns = asyncio.Semaphore(MAX_UPLOADS)
        self._fetching = FetchRoutes(service)

    def router(self) -> APIRouter:
        router = APIRouter(tags=["adapters"])
        upload: dict[str, Any] = {
            "openapi_extra": UPLOAD_BODY,
            "responses": error_responses(400, 403, 409, 412, 413, 415, 422, 503, 507),
        }
        known: dict[str, Any] = {"responses": error_responses(404, 503)}
        add = router.add_api_route
        add("/adapters", self.list, methods=["GET"], summary="Every adapter, resident or not")
        add(
            "/adapters",
            self.create,
            methods=["POST"],
            summary="Upload by form, or have a source fetched",
            **upload | {"openapi_extra": or_source(UPLOAD_BODY)},
        )
        add("/adapters/validate", self.validate, methods=["POST"], summary="Check an upload, keep nothing", **upload)
        add(
            "/adapters/{name}", self.put, methods=["PUT"], summary="Upload an adapter, or a new version of it", **upload
        )
        add("/adapters/{name}", self.get, methods=["GET"], summary="One adapter", **known)
        add("/adapters/{name}", self.delete, methods=["DELETE"], summary="Delete an adapter and its versions", **known)
        add("/adapters/{name}/versions", self.versions, methods=["GET"], summary="Every version of a name", **known)
        add("/adapters/{name}/pin", self.pin, methods=["POST"], summary="Load it and keep it on the device", **known)
        add("/adapters/{name}/unpin", self.unpin, methods=["POST"], summary="Let it be evicted again", **known)
        add("/adapters/{name}/load", self.load, methods=["POST"], summary="Bring it to the host", **known)
        add("/adapters/{name}/unload", self.unload, methods=["POST"], summary="Give its memory back", **known)
        add(
            "/adapters/{name}/rollback",
            self.rollback,
            methods=["POST"],
            summary="Return to an earlier version",
            **known,
        )
        return router

    async def list(self, request: Request) -> Response:
        seen, principal = self._service.seen(request), principal_of(request)
        entries = await self._threads.run(seen.list)
        aliases = await self._threads.run(seen.aliases)
        problems = self._service.intake.problems if principal.is_operator else ()
        content = {
            "adapters": [self._view(entry, request) for entry in entries],
            "aliases": [alias_view(alias, principal) for alias in aliases],
            "problems": [{"source": each.source, "problem": each.problem} for each in problems],
        }
        return json_response(content)

    async def get(self, name: str, request: Request) -> Response:
        return await self._entry(name, request)

    async def versions(self, name: str, request: Request) -> Response:
        versions = await self._threads.run(self._service.seen(request).versions, _plain(name))
        return json_response({"name": name, "versions": [version_view(version) for version in versions]})

    async def put(self, name: str, request: Request) -> Response:
        self._check_name(name, request)
        upload = await self._receive(request)
        if upload.name not in (None, name):
            raise BadRequest("name: the form and the address differ; leave it out of the form", param="name")
        return await self._publish(name, upload, request)

    async def create(self, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
            return await self._fetching.create(request, create_only=_create_only(request))
        upload = await self._receive(request)
        if upload.name is None:
            raise InvalidParameter("name: the form needs a field of this name", param="name")
        self._check_name(upload.name, request)
        return await self._publish(upload.name, upload, request)

    async def validate(self, request: Request) -> Response:
        upload = await self._receive(request)
        async with self._turns:
            found = await self._threads.run(self._parts.inspect, upload.files)
        return json_response({"digest": found.id, **summary_view(found.summary), "tried": False})

    async def delete(self, name: str, request: Request) -> Response:
        name, force, if_match = _plain(name), _flag(request, "force"), request.headers.get("if-match")
        await self._threads.run(self._service.seen(request).require_own, name)
        remove, publisher = self._service.intake.remove, principal_of(request).publisher
        in_flight = await self._threads.run(remove, name, force=force, if_match=if_match, publisher=publisher)
        if in_flight == 0:
            return Response(status_code=204)
        return json_response({"name": name, "state": "draining", "in_flight": in_flight}, status=202)

    async def pin(self, name: str, request: Request) -> Response:
        adapter = await self._id_of(name, request)
        snapshot = self._parts.engine.snapshot()
        others = snapshot.pinned - {adapter}
        if len(others) >= snapshot.num_pinnable:
            raise PreconditionFailed(
                f"adapter '{name}' cannot be pinned: {len(others)} of {snapshot.num_pinnable + 1} slots are pinned; "
                "one must stay free for everybody else: unpin another, or start with more (--max-resident-adapters)"
            )
        await self._threads.run(self._parts.catalog.pins.add, adapter, name.partition("@")[0])
        self._parts.engine.load(adapter)
        self._parts.engine.set_pinned(adapter, pinned=True)
        return await self._moved(name, request)

    async def unpin(self, name: str, request: Request) -> Response:
        adapter = await self._id_of(name, request)
        await self._threads.run(self._parts.catalog.pins.remove, [adapter])
        self._parts.engine.set_pinned(adapter, pinned=False)
        return await self._moved(name, request)

    async def load(self, name: str, request: Request) -> Response:
        self._parts.engine.load(await self._id_of(name, request))
        return await self._moved(name, request)

    async def unload(self, name: str, request: Request) -> Response:
        adapter = await self._id_of(name, request)
        if adapter in self._parts.engine.snapshot().pinned:
            raise PreconditionFailed(f"adapter '{name}' is pinned; POST /adapters/{name}/unpin first")
        self._parts.engine.unload(adapter)
        return await self._moved(name, request)

    async def rollback(self, name: str, request: Request) -> Response:
        """To the version in the body, else to the one before the current."""
        name, number = _plain(name), await _wanted_version(request)
        await self._threads.run(self._service.seen(request).require_own, name)
        if number is None:
            number = await self._threads.run(self._version_before, name)
        version = await self._threads.run(self._parts.catalog.changes.rollback, name, number)
        return json_response(version_view(version), headers={"etag": etag(version.id)})

    def _version_before(self, name: str) -> int:
        current = self._parts.catalog.get(name).version
        earlier = [
            version.number
            for version in self._parts.catalog.versions(name)
            if current is not None and 0 < version.number < current.number
        ]
        if not earlier:
            raise NotFound(f"adapter '{name}' has no earlier version to return to")
        return max(earlier)

    def _check_name(self, name: str, request: Request) -> None:
        check_name(name, base_name=self._parts.base.name)
        principal_of(request).require_reach(name)

    async def _receive(self, request: Request) -> Upload:
        try:
            return await receive_upload(request, self._limits, self._service.store_threads)
        except ServeError:
            self._parts.metrics.observe_upload("refused")
            raise

    async def _publish(self, name: str, upload: Upload, request: Request) -> Response:
        dry_run = _flag(request, "dry_run")
        published = await self._published(name, upload, request, dry_run=dry_run)
        content = published_view(published)
        if dry_run:
            return json_response(content | {"dry_run": True})
        self._parts.metrics.observe_upload("created" if published.created else "unchanged")
        status = 201 if published.created else 200
        headers = {"etag": etag(published.version.id), "location": f"/adapters/{name}"}
        return json_response(content, status=status, headers=headers)

    async def _published(self, name: str, upload: Upload, request: Request, *, dry_run: bool) -> Published:
        create_only = _create_only(request)
        if_match = request.headers.get("if-match")
        prove = partial(self._service.trial().prove, name)
        try:
            async with self._turns:
                return await self._threads.run(
                    self._parts.catalog.changes.publish,
                    name,
                    upload.files,
                    if_match=if_match,
                    create_only=create_only,
                    dry_run=dry_run,
                    prove=prove,
                    publisher=principal_of(request).publisher,
                )
        except ServeError as error:
            self._parts.metrics.observe_upload("refused" if error.status < 500 else "failed")
            raise

    async def _id_of(self, name: str, request: Request) -> AdapterId:
        """Of the current version, or of the one that the address names: what was pinned is that version's files."""
        resolved = await self._threads.run(self._service.seen(request).resolve, name)
        self._service.learn(resolved.id, resolved.name)
        return resolved.id

    async def _moved(self, name: str, request: Request) -> Response:
        return await self._entry(name.partition("@")[0], request, status=202)

    async def _entry(self, name: str, request: Request, *, status: int = 200) -> Response:
        entry = await self._threads.run(self._known, _plain(name), self._service.seen(request))
        headers = {} if entry.version is None else {"etag": etag(entry.version.id)}
        return json_response(self._view(entry, request), status=status, headers=headers)

    def _view(self, entry: Entry, request: Request) -> dict[str, Any]:
        """The entry, with its owner for those who may know other tenants."""
        principal = principal_of(request)
        is_told = entry.owner and (principal.is_admin or entry.owner == principal.tenant.name)
        return entry_view(entry, self._parts.engine.snapshot()) | ({"owner": entry.owner} if is_told else {})

    def _known(self, name: str, catalog: SeenCatalog) -> Entry:
        """The name's entry; a folder's checkpoint that nobody has used yet is looked at first."""
        entry = catalog.get(name)
        if entry.version is None and not entry.problem:
            with suppress(AdapterUnavailable, AdapterInvalid):  # the entry says what is wrong with it
                catalog.resolve(name)
            entry = catalog.get(name)
        return entry


def _plain(name: str) -> str:
    """The name in an address, which stands for all its versions; raises UnknownAdapter for one of them."""
    if "@" in name:
        raise UnknownAdapter("name the adapter without a version here", param="name")
    return name


def _flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "0").lower()
    if value not in ("0", "1", "true", "false", ""):
        raise InvalidParameter(f"{name}: 1 or 0", param=name)
    return value in ("1", "true")


def _create_only(request: Request) -> bool:
    given = request.headers.get("if-none-match")
    if given is not None and given.strip() != "*":
        raise BadRequest("if-none-match: only * is understood here", param="if-none-match")
    return given is not None


async def _wanted_version(request: Request) -> int | None:
    content = await read_small(request)  # below /adapters a body may be as large as an upload
    value: Any = parse_object(content).get("version") if content.strip() else None
    if value is None:
        return None
    if type(value) is not int or not 0 < value < 10**9:
        raise InvalidParameter("version: the number of an earlier version", param="version")
    return value
