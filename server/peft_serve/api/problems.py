"""One refusal, three renderings: problem+json (RFC 9457), OpenAI's error object, TGI's pair of fields.

Owns the mapping from a `ServeError` to a status, a body and headers. Knows no route.

The routes of the TGI family answer with every member of a problem and with TGI's two beside them, so that both
kinds of client read the body they expect.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from typing import Any, Final

from starlette.exceptions import HTTPException
from starlette.responses import Response

from peft_serve.errors import AdapterInvalid, AdapterUnavailable, InvalidParameter, PromptTooLong, Refusal, ServeError

TGI_PATHS: Final = frozenset(
    {"/", "/generate", "/generate_stream", "/tokenize", "/info", "/classify", "/classify_batch", "/embed"}
)
MAX_ERRORS: Final = 10
MAX_ERROR_CHARS: Final = 200
PROBLEM_TYPE: Final = "application/problem+json"


class Family(StrEnum):
    """Whose clients a route is for; it decides how an error reads."""

    NATIVE = "native"
    OPENAI = "openai"
    TGI = "tgi"


class FieldsInvalid(InvalidParameter):
    """A body with wrong fields: a bounded list of places and reasons."""

    def __init__(self, errors: Sequence[Refusal], *, num_errors: int | None = None) -> None:
        shown = tuple(Refusal(clip(e.path), clip(e.reason)) for e in errors[:MAX_ERRORS])
        total = len(errors) if num_errors is None else num_errors
        more = f" (and {total - len(shown)} more)" if total > len(shown) else ""
        text = "; ".join(f"{e.path}: {e.reason}" for e in shown) + more
        super().__init__(text, param=shown[0].path.rsplit(".", 1)[-1])
        self.errors = shown


class IncompleteGeneration(ServeError):  # noqa: N818  # the tree of errors names refusals
    """The server ended a request before it was complete."""

    status, code = 503, "incomplete_generation"


def clip(text: str, limit: int = MAX_ERROR_CHARS) -> str:
    """`text`, at most `limit` characters long."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def family_of(path: str) -> Family:
    """The family of the route at `path`."""
    if path == "/v1" or path.startswith("/v1/"):
        return Family.OPENAI
    return Family.TGI if path in TGI_PATHS else Family.NATIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What there is to say about a refusal, before it is put in a family's words."""

    status: int
    code: str
    message: str
    param: str | None = None
    errors: tuple[Refusal, ...] = ()
    headers: Mapping[str, str] | None = None


def problem_of(error: ServeError, family: Family) -> Problem:
    """`error` as the clients of `family` know it: OpenAI's have no 422."""
    status = error.status
    if family is Family.OPENAI and isinstance(error, InvalidParameter | PromptTooLong | AdapterInvalid):
        status = 400
    headers = None
    # Broken files stay broken until somebody puts them right: no time is named to come back at.
    is_lasting = isinstance(error, AdapterUnavailable) and error.retry_after_s is None
    if status in (429, 503) and not is_lasting:
        headers = {"retry-after": str(max(1, math.ceil(error.retry_after_s or 1.0)))}
    if status == 401:
        headers = {"www-authenticate": "Bearer"}
    errors = error.errors if isinstance(error, AdapterInvalid | FieldsInvalid) else ()
    return Problem(
        status=status, code=error.code, message=error.message, param=error.param, errors=errors, headers=headers
    )


def problem_of_http(error: HTTPException, *, methods: Collection[str] = ()) -> Problem:
    """What the router refuses by itself: a path nobody serves, a method it has not (`methods` are those it has)."""
    known = {404: "no such route; /docs lists them", 405: "this route has no such method; /docs lists them"}
    phrase = HTTPStatus(error.status_code).phrase
    return Problem(
        status=error.status_code,
        code=phrase.lower().replace(" ", "_"),
        message=known.get(error.status_code, phrase),
        headers={"allow": ", ".join(sorted({*methods, *_beside(methods)}))} if methods else error.headers,
    )


def _beside(methods: Collection[str]) -> Collection[str]:
    return ("HEAD",) if "GET" in methods else ()


def error_type(problem: Problem) -> str:
    """TGI's word for it: validation, overloaded, generation or incomplete_generation."""
    if problem.code == IncompleteGeneration.code:
        return "incomplete_generation"
    if problem.status in (429, 503) and problem.headers:
        return "overloaded"
    return "validation" if problem.status < 500 else "generation"


def _openai_type(status: int) -> str:
    named = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return named.get(status, "invalid_request_error" if status < 500 else "server_error")


def body_of(problem: Problem, family: Family, request_id: str | None = None) -> dict[str, Any]:
    """The body of an error response, or of an error event in a stream."""
    if family is Family.OPENAI:
        return {
            "error": {
                "message": problem.message,
                "type": _openai_type(problem.status),
                "param": problem.param,
                "code": problem.code,
            }
        }
    body: dict[str, Any] = {}
    if family is Family.TGI:
        body = {"error": problem.message, "error_type": error_type(problem)}
    body |= {
        "type": "about:blank",
        "title": HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": problem.message,
        "code": problem.code,
    }
    if request_id is not None:
        body["request_id"] = request_id
    if problem.param is not None:
        body["param"] = problem.param
    if problem.errors:
        body["errors"] = [{"path": e.path, "reason": e.reason} for e in problem.errors]
    return body


def response_of(problem: Problem, family: Family, request_id: str | None = None) -> Response:
    """The whole response. Its body is ASCII, whatever a caller managed to put into a name."""
    return Response(
        json.dumps(body_of(problem, family, request_id)),
        status_code=problem.status,
        headers=dict(problem.headers or {}),
        media_type="application/json" if family is Family.OPENAI else PROBLEM_TYPE,
    )
