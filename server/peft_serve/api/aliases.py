"""`/aliases`: names that stand for other adapters, by weight: made, listed, pointed elsewhere, rolled back, deleted.

What an alias may point to is the catalog's business; a key sees an alias whose name and targets it sees.
"""

from __future__ import annotations

import math
import re
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from peft_serve.adapters.alias_record import MAX_TARGET_WEIGHT, MAX_TARGETS, Revision, Target
from peft_serve.adapters.aliases import Alias, alias_tag
from peft_serve.adapters.names import check_name, is_name, shown
from peft_serve.api.json_body import parse_object, read_object
from peft_serve.api.json_response import json_response
from peft_serve.api.openapi import error_responses
from peft_serve.api.principal import Principal, principal_of
from peft_serve.api.service import Service
from peft_serve.errors import InvalidParameter, UnknownAdapter

_MAX_NUMBER: Final = 10**9
_WITH_VERSION: Final = re.compile(r"([^@]+)@([0-9]{1,9})")  # as requests name one version
_EXAMPLE: Final = {
    "targets": [{"adapter": "x", "version": 3, "weight": 90}, {"adapter": "x", "version": 4, "weight": 10}]
}
_TARGET_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["adapter"],
    "additionalProperties": False,
    "properties": {
        "adapter": {"type": "string"},
        "version": {"type": ["integer", "null"], "minimum": 0},
        "weight": {"type": "number", "minimum": 0, "maximum": MAX_TARGET_WEIGHT, "default": 1},
    },
}
_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["targets"],
                    "additionalProperties": False,
                    "properties": {
                        "targets": {"type": "array", "minItems": 1, "maxItems": MAX_TARGETS, "items": _TARGET_SCHEMA}
                    },
                },
                "example": _EXAMPLE,
            }
        },
    }
}


class AliasRoutes:
    """See the module's docstring."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._threads = service.store_threads
        self._aliases = service.parts.catalog.aliases

    def router(self) -> APIRouter:
        router = APIRouter(tags=["adapters"])
        add = router.add_api_route
        known: dict[str, Any] = {"responses": error_responses(404)}
        changed: dict[str, Any] = {"responses": error_responses(400, 403, 404, 409, 412, 422, 503, 507)}
        add("/aliases", self.list, methods=["GET"], summary="Every alias")
        add("/aliases/{name}", self.get, methods=["GET"], summary="One alias, with its revisions", **known)
        add(
            "/aliases/{name}",
            self.put,
            methods=["PUT"],
            summary="Point a name to adapters, by weight",
            openapi_extra=_BODY,
            **changed,
        )
        add("/aliases/{name}", self.delete, methods=["DELETE"], summary="Forget an alias", **changed)
        add(
            "/aliases/{name}/rollback",
            self.rollback,
            methods=["POST"],
            summary="Point it to what an earlier revision did",
            **changed,
        )
        return router

    async def list(self, request: Request) -> Response:
        found = await self._threads.run(self._service.seen(request).aliases)
        return json_response({"aliases": [alias_view(alias, principal_of(request)) for alias in found]})

    async def get(self, name: str, request: Request) -> Response:
        alias = await self._threads.run(self._service.seen(request).require_alias, name)
        return self._told(alias, request)

    async def put(self, name: str, request: Request) -> Response:
        check_name(name, base_name=self._service.parts.base.name)
        principal = principal_of(request)
        principal.require_reach(name)
        targets = _targets(await read_object(request))
        for target in targets:
            if not (is_name(target.adapter) and principal.sees(target.adapter)):
                raise UnknownAdapter(
                    f"target {shown(target.ref)} does not exist, or is an alias itself; GET /adapters lists what an "
                    "alias may point to",
                    param="targets",
                )
        alias, is_new = await self._threads.run(
            self._aliases.put, name, targets, publisher=principal.publisher, if_match=request.headers.get("if-match")
        )
        return self._told(alias, request, status=201 if is_new else 200)

    async def delete(self, name: str, request: Request) -> Response:
        await self._threads.run(self._service.seen(request).require_alias, name)
        if_match, publisher = request.headers.get("if-match"), principal_of(request).publisher
        await self._threads.run(self._aliases.delete, name, publisher=publisher, if_match=if_match)
        return Response(status_code=204)

    async def rollback(self, name: str, request: Request) -> Response:
        """To the revision in the body, else to the one before the current."""
        content = b"".join([chunk async for chunk in request.stream()])
        number = parse_object(content).get("revision") if content.strip() else None
        if number is not None and (type(number) is not int or not 0 < number < _MAX_NUMBER):
            raise InvalidParameter("revision: the number of an earlier revision", param="revision")
        seen = self._service.seen(request)
        alias = await self._threads.run(seen.rolled_back, name, number)
        return self._told(alias, request)

    def _told(self, alias: Alias, request: Request, *, status: int = 200) -> Response:
        principal = principal_of(request)
        kept = [each for each in alias.revisions.kept if principal.sees_targets(each)]
        content = alias_view(alias, principal) | {"revisions": [_revision_view(each) for each in kept]}
        return json_response(content, status=status, headers={"etag": alias_tag(alias)})


def alias_view(alias: Alias, principal: Principal) -> dict[str, Any]:
    """An alias as it is listed; its owner is told to those who may know other tenants."""
    now = _revision_view(alias.now)
    is_told = alias.owner and (principal.is_admin or alias.owner == principal.tenant.name)
    return {"name": alias.name, **now} | ({"owner": alias.owner} if is_told else {})


def _revision_view(revision: Revision) -> dict[str, Any]:
    whole = math.fsum(target.weight for target in revision.targets)
    targets = [target.to_json() | {"share": target.weight / whole} for target in revision.targets]
    return {"revision": revision.number, "created": revision.created, "targets": targets}


def _targets(body: dict[str, Any]) -> list[Target]:
    """The targets of a body; raises InvalidParameter with the place."""
    given = body.get("targets")
    unknown = [name for name in body if name != "targets"]
    if unknown:
        raise InvalidParameter(f"{shown(unknown[0])}: an alias has targets, and no other field", param="targets")
    if not isinstance(given, list) or not 0 < len(given) <= MAX_TARGETS:
        raise InvalidParameter(f"targets: a list of 1 to {MAX_TARGETS} targets", param="targets")
    targets = [_target(each, f"targets.{i}") for i, each in enumerate(given)]
    if len({target.ref for target in targets}) < len(targets):
        raise InvalidParameter("targets: one of them stands here twice; add their weights", param="targets")
    if not any(target.weight for target in targets):
        raise InvalidParameter("targets: all weights are 0; give one of them more", param="targets")
    return targets


def _target(given: Any, place: str) -> Target:
    if not isinstance(given, dict) or not given.keys() <= {"adapter", "version", "weight"}:
        raise InvalidParameter(f"{place}: an object with adapter, and if need be version and weight", param="targets")
    adapter, version, weight = given.get("adapter"), given.get("version"), given.get("weight", 1)
    if not isinstance(adapter, str):
        raise InvalidParameter(f"{place}.adapter: the name of an adapter", param="targets")
    written = _WITH_VERSION.fullmatch(adapter)
    if written is not None and version is None:
        adapter, version = written[1], int(written[2])
    if version is not None and (type(version) is not int or not 0 <= version < _MAX_NUMBER):
        raise InvalidParameter(f"{place}.version: the number of one of its versions, or null", param="targets")
    if type(weight) not in (int, float) or not 0 <= weight <= MAX_TARGET_WEIGHT:
        raise InvalidParameter(f"{place}.weight: a number from 0 to {MAX_TARGET_WEIGHT:g}", param="targets")
    return Target(adapter=adapter, version=version, weight=float(weight))
