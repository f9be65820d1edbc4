"""What an object store's library says, in words that may be shown: what the service answered, and the way out.

The library tells most of it in its text alone, and that text names addresses; of it only the service's own codes are
taken, and which kind of failure it was.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import Final

_CODE: Final = re.compile(r"<Code>([A-Za-z0-9.]{1,64})</Code>")
_STATUS: Final = re.compile(r"status code: ([0-9]{3})\b")
_REGION: Final = re.compile(
    r"<Region>([a-z0-9-]{1,40})</Region>|the region '([a-z0-9-]{1,40})'|expecting '([a-z0-9-]+)'"
)
_METADATA: Final = re.compile(r"//(169\.254\.169\.254|169\.254\.170\.2|\[fd00:ec2::254\])")

_KEYS: Final = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or the machine's role"
_ENDPOINT: Final = "check AWS_ENDPOINT, AWS_REGION and the network"
_BUCKET: Final = "make the bucket, or name another; for a store that is not Amazon's set AWS_ENDPOINT"
_REGION_OUT: Final = "set AWS_REGION to the bucket's region"
_RIGHTS: Final = "let these credentials do s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject there"
_LATER: Final = "look at the service itself, and try again"

NO_BUCKET: Final = "NoSuchBucket"


class ObjectStoreError(OSError):
    """An OSError whose number says what a disk's would, with a way out for the operator."""

    def __init__(self, number: int, what: str, way_out: str) -> None:
        super().__init__(number, what)
        self.way_out = way_out


@dataclass(frozen=True, slots=True)
class _Words:
    number: int
    what: str
    way_out: str


_REFUSED: Final = _Words(errno.EACCES, "the credentials are refused", _KEYS)
_EXPIRED: Final = _Words(errno.EACCES, "the credentials have expired", _KEYS)
_MAY_NOT: Final = _Words(errno.EACCES, "these credentials may not do that", _RIGHTS)
_ELSEWHERE: Final = _Words(errno.EIO, "the bucket is in another region", _REGION_OUT)
_BY_CODE: Final = {
    NO_BUCKET: _Words(errno.EIO, "there is no such bucket", _BUCKET),
    "InvalidBucketName": _Words(errno.EIO, "no bucket can have this name", _BUCKET),
    "InvalidAccessKeyId": _REFUSED,
    "InvalidClientTokenId": _REFUSED,
    "InvalidToken": _REFUSED,
    "SignatureDoesNotMatch": _REFUSED,
    "ExpiredToken": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "AccessDenied": _MAY_NOT,
    "AllAccessDisabled": _MAY_NOT,
    "RequestTimeTooSkewed": _Words(errno.EACCES, "this machine's clock is wrong", "set the clock"),
    "AuthorizationHeaderMalformed": _ELSEWHERE,
    "IllegalLocationConstraintException": _ELSEWHERE,
    "PermanentRedirect": _ELSEWHERE,
    "SlowDown": _Words(errno.EIO, "the service is overloaded", _LATER),
    "NotImplemented": _Words(errno.ENOTSUP, "the service lacks what is needed", "it has to know conditional writes"),
}


def told_as(error: BaseException) -> ObjectStoreError:
    """What went wrong, in a few words."""
    text = str(error)
    code, status = _first(_CODE, text), _first(_STATUS, text)
    if _METADATA.search(text):
        return ObjectStoreError(errno.EACCES, "there are no credentials", _KEYS)
    if status:
        words = _BY_CODE.get(code) or _by_status(int(status))
        region = _first(_REGION, text)
        where = f", {region}" if words is _ELSEWHERE and region else ""
        return ObjectStoreError(
            words.number, f"{words.what} ({' '.join(filter(None, (status, code)))}{where})", words.way_out
        )
    if "without LOCATION" in text:  # as S3 redirects what came to a wrong region
        return ObjectStoreError(_ELSEWHERE.number, _ELSEWHERE.what, _ELSEWHERE.way_out)
    if "kind: Timeout" in text or "TimedOut" in text:
        return ObjectStoreError(errno.ETIMEDOUT, "the object store does not answer", _ENDPOINT)
    if "dns error" in text:
        return ObjectStoreError(errno.EHOSTUNREACH, "the name of the object store's host is not known", _ENDPOINT)
    if "ConnectionRefused" in text:
        return ObjectStoreError(errno.ECONNREFUSED, "nothing listens at the object store's address", _ENDPOINT)
    if "kind: Connect" in text:
        return ObjectStoreError(errno.EHOSTUNREACH, "the object store cannot be reached", _ENDPOINT)
    return ObjectStoreError(
        errno.EIO, f"the object store did not answer as it should ({type(error).__name__})", _ENDPOINT
    )


def is_about_the_bucket(error: BaseException) -> bool:
    """Whether what is not found is the bucket, and no key in it."""
    return _first(_CODE, str(error)) == NO_BUCKET


def _by_status(status: int) -> _Words:
    if status in (401, 403):
        return _MAY_NOT
    if status in (301, 307, 308):
        return _ELSEWHERE
    if status >= 500:
        return _Words(errno.EIO, "the service has failed", _LATER)
    return _Words(errno.EIO, "the service did not answer as an object store does", _ENDPOINT)


def _first(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return "" if found is None else next((group for group in found.groups() if group), "")
