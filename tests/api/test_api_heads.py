"""HEAD wherever GET is, and the methods of an address where one is asked for that it has not."""

from __future__ import annotations

import httpx
import pytest

from tests.api.api_fakes import World

SAID = ("content-length", "content-type", "etag", "x-adapter-version")


@pytest.mark.parametrize(
    "path",
    ["/adapters/plain", "/adapters", "/adapters/plain/versions", "/adapters/plain/archive", "/adapters/nobody",
     "/info", "/v1/models", "/v1/models/nobody", "/docs", "/livez", "/health", "/ui/", "/ui/app.js", "/nowhere"],
)  # fmt: skip
def test_head_says_what_get_would(url: str, path: str) -> None:
    by_get, by_head = httpx.get(url + path), httpx.head(url + path)
    assert by_head.status_code == by_get.status_code
    assert {name: by_head.headers.get(name) for name in SAID} == {name: by_get.headers.get(name) for name in SAID}
    assert by_head.content == b""


def test_the_connection_goes_on_behind_a_head(url: str) -> None:
    with httpx.Client(base_url=url, timeout=5) as client:
        for _ in range(3):
            assert client.head("/adapters/plain/archive").status_code == 200
            assert client.get("/adapters/plain").json()["name"] == "plain"


def test_a_stream_is_left_at_its_head(url: str, world: World) -> None:
    with httpx.Client(base_url=url, timeout=5, limits=httpx.Limits(max_connections=1)) as client:
        for _ in range(4):
            answer = client.head("/v1/events")
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert client.get("/livez").status_code == 200, "the connection is free again"
    assert world.engine.num_live == 0


async def test_a_client_that_asked_for_a_version_is_told_it_stands(client: httpx.AsyncClient) -> None:
    tag = (await client.head("/adapters/plain/archive")).headers["etag"]
    again = await client.head("/adapters/plain/archive", headers={"if-none-match": tag})
    assert (again.status_code, again.headers["etag"]) == (304, tag)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PATCH", "/adapters/plain", "DELETE, GET, HEAD, PUT"),
        ("PUT", "/adapters", "GET, HEAD, POST"),
        ("GET", "/generate", "POST"),
        ("HEAD", "/generate", "POST"),
        ("DELETE", "/v1/models/plain", "GET, HEAD"),
        ("PUT", "/", "GET, HEAD, POST"),
    ],
)
async def test_a_method_that_is_not_there_is_told_which_are(
    client: httpx.AsyncClient, method: str, path: str, allowed: str
) -> None:
    answer = await client.request(method, path, headers={"accept": "*/*"})
    assert answer.status_code == 405
    assert answer.headers["allow"] == allowed
