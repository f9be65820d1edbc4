"""`/ui/`: known files only, with headers under which nothing else runs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from peft_serve.engine.snapshot import EngineState
from tests.api.api_fakes import World

UI = Path(__file__).resolve().parents[2] / "server" / "peft_serve" / "ui"
OWN = sorted(path for path in UI.iterdir() if path.suffix in (".js", ".css", ".html"))
BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


async def test_the_page_and_its_headers(client: httpx.AsyncClient) -> None:
    response = await client.get("/ui/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"
    policy = dict(part.strip().partition(" ")[::2] for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in response.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("app.js", "text/javascript; charset=utf-8"),
        ("style.css", "text/css; charset=utf-8"),
        ("icon.svg", "image/svg+xml"),
        ("vendor/preact.js", "text/javascript; charset=utf-8"),
        ("vendor/htm.LICENSE", "text/plain; charset=utf-8"),
    ],
)
async def test_files_have_their_types(client: httpx.AsyncClient, path: str, media_type: str) -> None:
    response = await client.get(f"/ui/{path}")
    assert response.status_code == 200
    assert response.headers["content-type"] == media_type
    assert response.content == (UI / path).read_bytes()
    head = await client.head(f"/ui/{path}")
    assert (head.status_code, head.content) == (200, b"")


async def test_a_browser_asks_again_and_is_told_that_nothing_changed(client: httpx.AsyncClient) -> None:
    tag = (await client.get("/ui/app.js")).headers["etag"]
    for given in (tag, f'"x", W/{tag}'):
        again = await client.get("/ui/app.js", headers={"if-none-match": given})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert (await client.get("/ui/app.js", headers={"if-none-match": '"other"'})).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["nothing.js", "../config.py", "..%2Fconfig.py", "%2e%2e/config.py", "vendor", "vendor/", "vendor/README.md",
     "//etc/passwd", "app.js%00", "App.js", "..%5Cconfig.py"],
)  # fmt: skip
async def test_nothing_else_is_a_file(client: httpx.AsyncClient, path: str) -> None:
    response = await client.send(
        httpx.Request("GET", httpx.URL("http://server", raw_path=f"/ui/{path}".encode(), path=None))
    )
    assert response.status_code == 404, response.text
    assert response.json()["code"] == "not_found"


async def test_a_browser_finds_the_page(client: httpx.AsyncClient) -> None:
    for path, headers in (("/", BROWSER), ("/ui", BROWSER), ("/ui", {})):
        response = await client.get(path, headers=headers)
        assert response.status_code == 307
        assert str(response.next_request.url) == "http://server/ui/"  # type: ignore[union-attr]


async def test_programs_find_at_the_root_how_the_server_is_and_where_to_go_on(
    client: httpx.AsyncClient, world: World
) -> None:
    response = await client.get("/")
    assert response.status_code == 200
    said = response.json()
    routes = said.pop("routes")
    assert said == (await client.get("/health")).json()
    for route in routes.values():
        method, path = route.split()
        body = {"json": {"inputs": "a"}} if method == "POST" else {}
        assert (await client.request(method, path, **body)).status_code == 200, route
    assert (await client.post("/", json={"inputs": "a"})).status_code == 200
    snapshot = world.engine.snapshot
    world.engine.snapshot = lambda: replace(snapshot(), state=EngineState.DEAD)  # type: ignore[method-assign]
    assert [(await client.get(path)).status_code for path in ("/", "/health")] == [503, 503]


def test_every_file_that_is_named_is_there() -> None:
    for page in OWN:
        for target in re.findall(r"""(?:from|href=|src=)\s*["']([^"'$#]+)["']""", page.read_text()):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    index = (UI / "index.html").read_text()
    assert not re.search(r"<style|\bon\w+=|style=|javascript:", index)
    assert re.findall(r"<script[^>]*>(.*?)</script>", index, re.DOTALL) == [""]
    for path in OWN:
        text = path.read_text()
        assert not re.search(r"https?://|(?<![:\w])//\w+\.\w", re.sub(r"(?m)^\s*//.*$|(?<=[;{}]) // .*$", "", text)), (
            path
        )
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text), path


def test_files_are_short() -> None:
    for path in OWN:
        assert len(path.read_text().splitlines()) <= 350, path
