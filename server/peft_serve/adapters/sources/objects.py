"""Folders of object stores, by obstore: one wheel for S3, Google's and Azure's, brought in by an extra.

Credentials and endpoints are the environment's, as the vendors name them (`AWS_*`, `GOOGLE_*`, `AZURE_*`), or those of
the machine's role; a caller names a bucket and a folder and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from peft_serve.adapters.sources.folder import Mark
from peft_serve.adapters.sources.locator import Kind, Locator
from peft_serve.errors import FetchFailed, Forbidden, NotFound, PayloadTooLarge

if TYPE_CHECKING:
    from obstore.store import ObjectStore

EXTRA: Final = "pip install 'peft-serve[objects]'"
_VENDORS: Final = {Kind.S3: "AWS", Kind.GS: "GOOGLE", Kind.AZ: "AZURE"}
_CHUNK_BYTES: Final = 1 << 20
_CONNECT_S: Final = 10
_REQUEST_S: Final = 600


def open_store(locator: Locator) -> ObjectStore:
    """The store of a locator's folder, not yet asked for anything."""
    from obstore.store import AzureStore, GCSStore, S3Store

    bucket, prefix = locator.steps[0], "/".join(locator.steps[1:]) or None
    options: Any = {
        "connect_timeout": timedelta(seconds=_CONNECT_S),
        "timeout": timedelta(seconds=_REQUEST_S),
        # Given options replace those of the environment, of which this one is needed for a store without TLS.
        "allow_http": os.environ.get(f"{_VENDORS[locator.kind]}_ALLOW_HTTP", "").lower() in ("1", "true"),
    }
    retries: Any = {"max_retries": 2, "retry_timeout": timedelta(seconds=_REQUEST_S)}
    if locator.kind is Kind.S3:
        return S3Store(bucket, prefix=prefix, client_options=options, retry_config=retries)
    if locator.kind is Kind.GS:
        return GCSStore(bucket, prefix=prefix, client_options=options, retry_config=retries)
    return AzureStore(bucket, prefix=prefix, client_options=options, retry_config=retries)


class ObjectFolder:
    """A locator's folder in a store whose root it is."""

    def __init__(self, locator: Locator, make_store: Callable[[Locator], ObjectStore] = open_store) -> None:
        self._locator = locator
        self._make_store = make_store
        self._store: ObjectStore | None = None

    @property
    def provenance(self) -> str:
        return str(self._locator)

    def listing(self) -> Mapping[str, Mark]:
        import obstore
        from obstore.exceptions import BaseError

        try:
            found = obstore.list_with_delimiter(self._opened())["objects"]
        except (BaseError, ValueError) as error:
            raise self._failed(error) from error
        if not found:
            raise NotFound(f"source {self.provenance}: there is nothing in this folder; check bucket and path")
        stamps = [(each, each["e_tag"] or each["last_modified"].isoformat()) for each in found]
        return {each["path"].rpartition("/")[2]: Mark(each["size"], stamp) for each, stamp in stamps}

    def read(self, name: str, max_bytes: int, on_bytes: Callable[[int], None]) -> bytes:
        import obstore
        from obstore.exceptions import BaseError

        content = bytearray()
        try:
            for chunk in obstore.get(self._opened(), name).stream(min_chunk_size=_CHUNK_BYTES):
                content += bytes(chunk)
                if len(content) > max_bytes:
                    raise PayloadTooLarge(f"{name} has more than {max_bytes} bytes, which is what this server accepts")
                on_bytes(len(chunk))
        except BaseError as error:
            raise self._failed(error) from error
        return bytes(content)

    def _opened(self) -> ObjectStore:
        if self._store is None:
            self._store = self._make_store(self._locator)
        return self._store

    def _failed(self, error: Exception) -> Exception:
        from obstore import exceptions

        what = f"source {self.provenance}"
        said = str(error)  # of a listing that fails, the library tells the status in words alone
        if isinstance(error, exceptions.NotFoundError) or "404 Not Found" in said:
            return NotFound(f"{what}: there is no such bucket or object")
        is_denied = isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError)
        if is_denied or "403 Forbidden" in said or "401 Unauthorized" in said:
            return Forbidden(f"{what}: the server's credentials do not open it; the operator sets them for the server")
        return FetchFailed(f"{what}: the object store did not answer as it should ({type(error).__name__}); try later")
