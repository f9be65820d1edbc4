"""`/ui/`: the playground's files, as they lie in the package.

Every file is read and named when the application is made, so that an address can only be one of them. Knows nothing
of what the page does: it speaks to the other routes, as any client.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from peft_serve.api.service import Service
from peft_serve.errors import NotFound

INDEX: Final = "index.html"

_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}

# Nothing but these files runs or is fetched: an adapter's name that got past the page as markup would do nothing.
_HEADERS: Final[Mapping[str, str]] = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asked for every time, and answered 304: a new release must not meet old scripts
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Page:
    content: bytes
    media_type: str
    etag: str


class PlaygroundRoutes:
    """See the module's docstring."""

    def __init__(self, service: Service) -> None:  # noqa: ARG002  # made as every family of routes is
        self._pages = dict(_pages(files("peft_serve") / "ui"))

    def router(self) -> APIRouter:
        router = APIRouter(include_in_schema=False)
        router.add_api_route("/ui", self.moved, methods=["GET"])
        router.add_api_route("/ui/{path:path}", self.page, methods=["GET"])
        return router

    async def moved(self) -> Response:
        return moved()

    async def page(self, path: str, request: Request) -> Response:
        page = self._pages.get(path or INDEX)
        if page is None:
            raise NotFound("the playground has no such file; it is at /ui/")
        headers = {**_HEADERS, "etag": page.etag}
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if page.etag in known:
            return Response(status_code=304, headers=headers)
        # starlette would add a charset to types that have one already
        return Response(page.content, headers={**headers, "content-type": page.media_type})


def moved() -> Response:
    """To the page, from `/` or `/ui`."""
    # A relative address, so that a proxy may serve all of this below a path of its own.
    return RedirectResponse("ui/", status_code=307, headers={"cache-control": "no-cache"})


def _pages(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, _Page]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _pages(entry, f"{prefix}{entry.name}/")
            continue
        media_type = _TYPES.get(f".{entry.name.rpartition('.')[2]}")
        if media_type is not None:
            content = entry.read_bytes()
            digest = hashlib.sha256(content).hexdigest()[:32]
            yield prefix + entry.name, _Page(content=content, media_type=media_type, etag=f'"{digest}"')
