"""`GET /adapters/{name}/archive`: the files of a version as they are kept, in a tar.

The files go in the order of the digest, so that whoever receives them can compute it. Knows what a checkpoint's files
are called in an upload, so that what was fetched here can be sent there.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from typing import Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from peft_serve.adapters.adapterhub.config import is_adapterhub
from peft_serve.adapters.changes import etag
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.records import HUB_WEIGHTS_FILE, WEIGHTS_FILE, CheckpointFiles, Resolved
from peft_serve.api.openapi import error_responses
from peft_serve.api.seen_catalog import SeenCatalog
from peft_serve.api.service import Service
from peft_serve.api.sse import until_gone
from peft_serve.errors import AdapterDamaged, QueueFull

MAX_DOWNLOADS: Final = 2
"""Downloads at the same time: each has the whole of its files in memory, however slowly they are taken."""

_CHUNK: Final = 1 << 18
_RETRY_AFTER_S: Final = 5.0
_TAR: Final = "application/x-tar"


class ArchiveRoutes:
    """See the module's docstring."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._threads = service.store_threads
        self._catalog = service.parts.catalog
        self._num_running = 0

    def router(self) -> APIRouter:
        router = APIRouter(tags=["adapters"])
        router.add_api_route(
            "/adapters/{name}/archive",
            self.archive,
            methods=["GET"],
            summary="The files of a version, as a .tar",
            responses=error_responses(404, 422, 429, 503) | {200: {"content": {_TAR: {}}}},
            response_class=Response,
        )
        return router

    async def archive(self, name: str, request: Request) -> Response:
        """Of the current version, or of `name@3` or `name@sha256:..`."""
        seen = self._service.seen(request)
        found = await self._threads.run(seen.resolve, name)
        if etag(found.id) in [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]:
            return Response(status_code=304, headers=_facts(found))
        if self._num_running >= MAX_DOWNLOADS:
            raise QueueFull("so many downloads run already; come back later", retry_after_s=_RETRY_AFTER_S)
        self._num_running += 1
        try:
            found, files = await self._threads.run(self._read, name, found, seen)
        except BaseException:
            self._num_running -= 1
            raise
        return ArchiveResponse(_members(files), _headers(found), on_close=self._ended)

    def _read(self, name: str, found: Resolved, seen: SeenCatalog) -> tuple[Resolved, CheckpointFiles]:
        """The files of `found`; where it was deleted since, what `name` stands for now, with its files. Raises
        UnknownAdapter where that is nothing, and AdapterUnavailable."""
        while True:
            try:
                return found, self._catalog.files(found.id)
            except AdapterDamaged:
                now = seen.resolve(name)
                if now.id == found.id:
                    raise
                found = now

    def _ended(self) -> None:
        self._num_running -= 1
        assert self._num_running >= 0, "a download ends once"


def _facts(found: Resolved) -> dict[str, str]:
    return {"etag": etag(found.id), "x-adapter": found.name, "x-adapter-version": str(found.number)}


def _headers(found: Resolved) -> dict[str, str]:
    file = f"{found.name}-{found.number}.tar"  # names are plain: letters, digits, dots and dashes
    return {
        **_facts(found),
        "content-disposition": f'attachment; filename="{file}"',
        "cache-control": "private, no-cache",
    }


def _members(files: CheckpointFiles) -> dict[str, bytes]:
    """The files under the names by which an upload knows them: AdapterHub's weights are called otherwise there."""
    contents = files.contents()
    if not is_adapterhub(files.config, GateLimits()):
        return contents
    return {HUB_WEIGHTS_FILE if name == WEIGHTS_FILE else name: content for name, content in contents.items()}


class ArchiveResponse(Response):
    """Writes a tar of files in memory, a piece at a time. `on_close` is called once, however it ends."""

    def __init__(self, members: dict[str, bytes], headers: dict[str, str], *, on_close: Callable[[], None]) -> None:
        super().__init__(status_code=200, media_type=_TAR, headers=headers)
        padded = sum(-(-len(content) // tarfile.BLOCKSIZE) + 1 for content in members.values())
        self.headers["content-length"] = str((padded + 2) * tarfile.BLOCKSIZE)
        self._members = members
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            await until_gone(self._write(send), receive)
        finally:
            self._on_close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for piece in _tarred(self._members):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _tarred(members: dict[str, bytes]) -> Iterator[bytes]:
    """A plain tar, the same bytes for the same files."""
    for name, content in members.items():
        head = tarfile.TarInfo(name)
        head.size = len(content)
        head.mode = 0o644
        yield head.tobuf(tarfile.USTAR_FORMAT)
        view = memoryview(content)
        for start in range(0, len(content), _CHUNK):
            yield bytes(view[start : start + _CHUNK])
        yield bytes(-len(content) % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)
