"""A bucket in an object store, by obstore: S3, and what speaks its language with conditional writes.

Credentials, endpoint and region are the environment's (`AWS_*`), or those of the machine's role. What the library says
becomes an OSError whose number says what is wrong (`object_words`); its own words name addresses and are shown to
nobody. No request waits long for a store that takes connections and says nothing.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from peft_serve.adapters.shared.bucket import Found, Oversize
from peft_serve.adapters.shared.object_words import is_about_the_bucket, told_as

if TYPE_CHECKING:
    from obstore.store import ObjectStore

EXTRA: Final = "pip install 'peft-serve[s3]'"
SCHEME: Final = "s3://"

_CHUNK_BYTES: Final = 1 << 20
_CONNECT_S: Final = 3
_REQUEST_S: Final = 5
_BULK_S: Final = 600  # for a file of a checkpoint, as long as bytes come or go
_SILENCE_S: Final = 15  # without any: a part of a file has to be sent in that time
_BULK_STEPS: Final = 5  # a key of so many steps is one
_PARTS_AT_ONCE: Final = 4  # of a file that is sent in parts
_ENDPOINTS: Final = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


def open_objects(url: str, *, timeout_s: int = _REQUEST_S) -> ObjectStore:
    """The store behind `s3://bucket/prefix`, not yet asked for anything; raises ValueError."""
    try:
        from obstore.store import S3Store
    except ImportError:
        raise ValueError(f"--store {SCHEME}..: object stores need an extra: {EXTRA}") from None
    bucket, _, prefix = url.removeprefix(SCHEME).partition("/")
    steps = [step for step in prefix.split("/") if step]
    if not url.startswith(SCHEME) or not bucket or any(step in (".", "..") for step in steps):
        raise ValueError("--store: a place in an object store is s3://bucket or s3://bucket/prefix")
    options: Any = {
        "connect_timeout": timedelta(seconds=_CONNECT_S),
        "read_timeout": timedelta(seconds=min(timeout_s, _SILENCE_S)),
        "timeout": timedelta(seconds=timeout_s),
        # Given options replace those of the environment, of which this one is needed for a store without TLS.
        "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true"),
    }
    _require_endpoint(allows_http=options["allow_http"])
    # A retry begins only within this time, so that one that is not answered ends what was asked.
    retries: Any = {"max_retries": 2, "retry_timeout": timedelta(seconds=_CONNECT_S)}
    return S3Store(bucket, prefix="/".join(steps) or None, client_options=options, retry_config=retries)


def _require_endpoint(*, allows_http: bool) -> None:
    """The library ends the thread on an address that is none, instead of an error."""
    for name in _ENDPOINTS:
        given = os.environ.get(name, "")
        if given and not given.startswith(("http://", "https://")):
            raise ValueError(f"{name}: the address of an object store begins with http:// or https://")
        if given.startswith("http://") and not allows_http:
            raise ValueError(f"{name}: begins with http://, which is used with AWS_ALLOW_HTTP=true only")


class ObjectBucket:
    """The keys below the root of an obstore store. `bulk` is another way to it, for what may take long."""

    def __init__(self, objects: ObjectStore, bulk: ObjectStore | None = None) -> None:
        self._objects = objects
        self._bulk = bulk or objects

    @classmethod
    def at(cls, url: str) -> ObjectBucket:
        """The bucket at `s3://bucket/prefix`; raises ValueError for what is no such place."""
        return cls(open_objects(url), open_objects(url, timeout_s=_BULK_S))

    def _way_to(self, key: str) -> ObjectStore:
        return self._bulk if len(key.split("/")) >= _BULK_STEPS else self._objects

    def get(self, key: str, *, max_bytes: int) -> Found | None:
        import obstore

        content = bytearray()
        try:
            with _told():
                answer = obstore.get(self._way_to(key), key)
                tag = answer.meta["e_tag"]
                for chunk in answer.stream(min_chunk_size=_CHUNK_BYTES):
                    content += bytes(chunk)
                    if len(content) > max_bytes:
                        raise Oversize(key)
        except FileNotFoundError:
            return None
        return Found(content=bytes(content), tag=_tag(tag))

    def put(self, key: str, content: bytes) -> None:
        import obstore

        with _told():
            obstore.put(self._way_to(key), key, content, max_concurrency=_PARTS_AT_ONCE)

    def put_new(self, key: str, content: bytes) -> str | None:
        return self._put_if(key, content, "create")

    def replace(self, key: str, content: bytes, tag: str) -> str | None:
        return self._put_if(key, content, {"e_tag": tag})

    def _put_if(self, key: str, content: bytes, mode: Any) -> str | None:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:
            with _told():
                return _tag(obstore.put(self._objects, key, content, mode=mode, use_multipart=False)["e_tag"])
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            return None

    def tags(self, prefix: str) -> dict[str, str]:
        import obstore

        with _told():
            pages = obstore.list(self._objects, prefix.rstrip("/") or None)
            return {each["path"]: _tag(each["e_tag"]) for page in pages for each in page}

    def remove(self, key: str) -> None:
        import obstore

        keys = list(self.tags(key)) if key.endswith("/") else [key]
        for each in keys:
            try:
                with _told():
                    obstore.delete(self._objects, each)
            except FileNotFoundError:
                continue

    def require_room(self, num_bytes: int) -> None:
        """An object store has room for everybody."""

    def tidy(self) -> None:
        """It leaves nothing behind but parts of uploads that broke off, which the bucket's own rules remove."""


def _tag(found: str | None) -> str:
    if not found:
        raise OSError(errno.ENOTSUP, "this object store gives no entity tags")
    return found


@contextmanager
def _told() -> Iterator[None]:
    """Turn what the library raises into OSError, but for the answers that are none: they are for the caller."""
    from obstore import exceptions

    try:
        yield
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError, FileNotFoundError) as error:
        if is_about_the_bucket(error):  # else every key would be taken for one that was never written
            raise told_as(error) from error
        raise
    except exceptions.BaseError as error:
        raise told_as(error) from error
