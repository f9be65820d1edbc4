"""What the OpenAPI page says about bodies and errors that the routes read and write themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from peft_serve.api.bodies import ChatBody, CompletionBody, GenerateBody, Parameters, TokenizeBody
from peft_serve.api.reading_bodies import ClassifyBody, ClassifyParameters, EmbedBody, EmbeddingsBody, EmbedParameters
from peft_serve.api.route_needs import Need, RouteNeeds
from peft_serve.api.splitting import SESSION_HEADER
from peft_serve.api.waiting import WAIT_HEADER

_MODELS: Final[tuple[type[BaseModel], ...]] = (
    GenerateBody, Parameters, CompletionBody, ChatBody, TokenizeBody, ClassifyBody, ClassifyParameters, EmbedBody,
    EmbedParameters, EmbeddingsBody,
)  # fmt: skip
_REFERENCE: Final = "#/components/schemas/"

_MEANINGS: Final[Mapping[int, str]] = {
    400: "The request contradicts itself, or cannot be read",
    401: "A key is asked for, and this is none that the server knows",
    403: "The key, or the server, does not allow this",
    404: "No such adapter",
    408: "The body came too slowly",
    409: "The name, or what points to it, stands in the way",
    412: "The name moved meanwhile, or exists already",
    413: "The body is too large",
    415: "The body is encoded, or of a type that is not read",
    422: "A field, or an uploaded adapter, is refused; the message says which and why",
    429: "Too many requests wait, or a quota is used up; Retry-After says when to come back",
    500: "An error on the server's side",
    503: "Starting, draining, or this adapter cannot be used",
    507: "The disk is full",
}

ADAPTER_QUERY: Final = {
    "name": "adapter",
    "in": "query",
    "required": False,
    "description": "name, name@version or name@sha256:..; a+b or a:0.7+b:0.3 for several together; the header "
    "X-Adapter says the same",
    "schema": {"type": "string"},
}
TASK_QUERY: Final = {
    "name": "task_id",
    "in": "query",
    "required": False,
    "description": "which task is meant, of an adapter that holds several",
    "schema": {"type": "integer", "minimum": 0},
}

_ARCHIVE: Final = {"schema": {"type": "string", "format": "binary"}}
_FORM: Final = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "description": "needed by POST /adapters"},
        "archive": {"type": "string", "format": "binary"},
        "adapter_config.json": {"type": "string", "format": "binary"},
        "adapter_model.safetensors": {"type": "string", "format": "binary"},
        "peft_serve.json": {"type": "string", "format": "binary"},
    },
}
UPLOAD_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "description": "A PEFT checkpoint folder as .zip, .tar or .tar.gz, or its files as a form",
        "content": {
            "application/zip": _ARCHIVE,
            "application/x-tar": _ARCHIVE,
            "application/gzip": _ARCHIVE,
            "multipart/form-data": {"schema": _FORM},
        },
    },
    "parameters": [
        {"name": "dry_run", "in": "query", "schema": {"enum": ["0", "1"]}, "description": "1: check only"},
        {
            "name": "If-Match",
            "in": "header",
            "schema": {"type": "string"},
            "description": "publish over this ETag only",
        },
        {"name": "If-None-Match", "in": "header", "schema": {"enum": ["*"]}, "description": "create only"},
        {"name": "Content-Digest", "in": "header", "schema": {"type": "string"}, "description": "sha-256=:<base64>:"},
    ],
}


def json_body(model: str, example: Mapping[str, Any], *, has_adapter: bool = False) -> dict[str, Any]:
    """A route's `openapi_extra`: its body is `model`."""
    content = {"schema": {"$ref": _REFERENCE + model}, "example": dict(example)}
    extra: dict[str, Any] = {"requestBody": {"required": True, "content": {"application/json": content}}}
    if has_adapter:
        extra["parameters"] = [ADAPTER_QUERY, TASK_QUERY, WAIT_HEADER, SESSION_HEADER]
    return extra


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a native route."""
    problem = {"application/problem+json": {"schema": {"$ref": _REFERENCE + "Problem"}}}
    return {status: {"description": _MEANINGS[status], "content": problem} for status in statuses}


def openai_error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route under /v1."""
    error = {"application/json": {"schema": {"$ref": _REFERENCE + "OpenAIError"}}}
    return {status: {"description": _MEANINGS[status], "content": error} for status in statuses}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of `app`."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas: dict[str, Any] = document.setdefault("components", {}).setdefault("schemas", {})
    for model in _MODELS:
        schema = model.model_json_schema(ref_template=_REFERENCE + "{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    # A body reads its parameters itself, to say what is wrong with them by name.
    for body, parameters in (
        ("GenerateBody", "Parameters"),
        ("ClassifyBody", "ClassifyParameters"),
        ("EmbedBody", "EmbedParameters"),
    ):
        schemas[body]["properties"]["parameters"] = {"$ref": _REFERENCE + parameters}
    _describe_bodies(document)
    _describe_streams(document)
    _describe_access(document)
    schemas["Problem"] = _PROBLEM
    schemas["OpenAIError"] = _OPENAI_ERROR
    return document


def _describe_bodies(document: dict[str, Any]) -> None:
    """How a body is refused before any route has read it."""
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if "requestBody" in operation:
                _add_refusals(operation, path, 400, 408, 413, 415)


def _describe_streams(document: dict[str, Any]) -> None:
    """Which routes answer with events, always or where `stream` asks for them."""
    for path, method in _STREAMED.items():
        answer = document["paths"][path][method]["responses"]["200"]
        answer.setdefault("content", {})["text/event-stream"] = {}


def _add_refusals(operation: dict[str, Any], path: str, *statuses: int) -> None:
    refused = openai_error_responses if path.startswith("/v1/") else error_responses
    added = {str(status): told for status, told in refused(*statuses).items()}
    operation["responses"] = dict(sorted((added | operation["responses"]).items()))


def _describe_access(document: dict[str, Any]) -> None:
    """Which routes ask for a key, on a server that has keys, and how they refuse."""
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    needs = RouteNeeds()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if needs.of(method.upper(), path) <= {Need.NONE}:
                continue
            # {}: on a server without keys, none is asked for.
            operation["security"] = [{}, {"bearer": []}, {"x-api-key": []}]
            _add_refusals(operation, path, 401, 403, 429)


_STREAMED: Final = {
    "/": "post",
    "/generate": "post",
    "/generate_stream": "post",
    "/v1/completions": "post",
    "/v1/chat/completions": "post",
    "/v1/events": "get",
}
_STRING: Final = {"type": "string"}
_PROBLEM: Final = {
    "type": "object",
    "description": "RFC 9457. Routes that TGI's clients call carry `error` and `error_type` beside it.",
    "required": ["type", "title", "status", "detail", "code"],
    "properties": {
        "type": _STRING,
        "title": _STRING,
        "status": {"type": "integer"},
        "detail": _STRING,
        "code": _STRING,
        "request_id": _STRING,
        "param": _STRING,
        "errors": {
            "type": "array",
            "items": {"type": "object", "properties": {"path": _STRING, "reason": _STRING}},
        },
        "error": _STRING,
        "error_type": {"enum": ["validation", "overloaded", "generation", "incomplete_generation"]},
    },
}
_NULLABLE: Final = {"type": ["string", "null"]}
_CODE: Final = {"type": ["string", "integer", "null"]}  # vLLM's routes say the status here
_OPENAI_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {"message": _STRING, "type": _STRING, "param": _NULLABLE, "code": _CODE},
        }
    },
}
