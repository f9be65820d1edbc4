"""Every way a request can be refused, blame in the type, status in the class.

ServeError
|-- BadRequest            400  the body or the names in it contradict themselves
|   |-- AdapterConflict   400  two places of one request name different adapters
|   `-- MalformedUpload   400  an upload that cannot be read at all
|-- Unauthorized          401
|-- Forbidden             403
|   `-- StorageQuotaExceeded 403  a tenant keeps as much as it may; waiting does not help
|-- UnknownAdapter        404  never answered by the base model instead
|-- NotFound              404
|-- Conflict              409  the name, or what points to it, stands in the way
|-- RequestTimeout        408  a body that came too slowly
|-- PreconditionFailed    412  the name moved meanwhile, or exists already
|-- PayloadTooLarge       413
|-- UnsupportedMediaType  415
|-- InvalidParameter      422  a field outside its range (400 on /v1)
|-- PromptTooLong         422  prompt + new tokens beyond the context (400 on /v1)
|-- AdapterInvalid        422  a readable adapter that is refused, one reason a place (400 on /v1)
|-- QueueFull             429  with Retry-After
|   `-- DeadlineMissed    429  would be, or was, not begun in the time it was to wait
|-- QuotaExceeded         429  of a tenant, with Retry-After
|-- Internal              500
|-- FetchFailed           502  a source of adapters did not give what it should
|-- Unavailable           503  starting, draining or dead, with Retry-After
|   `-- AdapterUnavailable 503 this adapter's files are corrupt, missing or do not load
|       `-- AdapterDamaged 503 they do not match their digest, or are not there: an upload mends that
`-- StoreFull             507

A message names the thing, the rule and the way out, and never a path, a traceback or an address.
Turning one into a response is the business of `api.problems` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


class ServeError(Exception):
    """A refusal that may be shown to the caller as it stands."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class BadRequest(ServeError):
    status, code = 400, "bad_request"


class AdapterConflict(BadRequest):
    code = "adapter_conflict"


class MalformedUpload(BadRequest):
    code = "malformed_upload"


class Unauthorized(ServeError):
    status, code = 401, "unauthorized"


class Forbidden(ServeError):
    status, code = 403, "forbidden"


class StorageQuotaExceeded(Forbidden):
    code = "storage_quota_exceeded"


class UnknownAdapter(ServeError):
    status, code = 404, "model_not_found"


class NotFound(ServeError):
    status, code = 404, "not_found"


class Conflict(ServeError):
    status, code = 409, "conflict"


class RequestTimeout(ServeError):
    status, code = 408, "request_timeout"


class PreconditionFailed(ServeError):
    status, code = 412, "precondition_failed"


class PayloadTooLarge(ServeError):
    status, code = 413, "payload_too_large"


class UnsupportedMediaType(ServeError):
    status, code = 415, "unsupported_media_type"


class InvalidParameter(ServeError):
    status, code = 422, "invalid_parameter"


class PromptTooLong(ServeError):
    status, code = 422, "context_length_exceeded"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reason an adapter is refused: the place in the checkpoint, and the rule with its way out."""

    path: str
    reason: str


class AdapterInvalid(ServeError):
    status, code = 422, "adapter_invalid"

    def __init__(self, errors: Sequence[Refusal], *, what: str = "") -> None:
        """`what` says which adapter it is, where the request does not."""
        first = errors[0]
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        super().__init__(
            f"{what}: {first.path}: {first.reason}{more}" if what else f"{first.path}: {first.reason}{more}"
        )
        self.errors = tuple(errors)


class QueueFull(ServeError):
    status, code = 429, "overloaded"


class DeadlineMissed(QueueFull):
    code = "deadline_missed"


class QuotaExceeded(ServeError):
    status, code = 429, "quota_exceeded"

    def __init__(self, message: str, *, quota: str, retry_after_s: float) -> None:
        """`quota` is the name of the one that is used up."""
        super().__init__(f"{message}; try again in {max(1.0, retry_after_s):.0f} s", retry_after_s=retry_after_s)
        self.quota = quota


class Internal(ServeError):
    status, code = 500, "internal"


class FetchFailed(ServeError):
    status, code = 502, "fetch_failed"


class Unavailable(ServeError):
    status, code = 503, "unavailable"


class AdapterUnavailable(Unavailable):
    code = "adapter_unavailable"


class AdapterDamaged(AdapterUnavailable):
    """Its files do not match their digest or are not there, until the same files are uploaded again."""


class StoreFull(ServeError):
    status, code = 507, "store_full"
