"""The door: every route against every kind of key, by the table that the documentation shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.datastructures import Headers

from peft_serve.api.app import create_app
from peft_serve.api.door import MAX_TOKEN_CHARS, token_of, trouble_of
from peft_serve.api.key_file import read_keys
from peft_serve.api.keyring import Keyring
from peft_serve.api.route_needs import ENTRIES, Entry, Need, RouteNeeds
from peft_serve.config import Settings
from tests.api.api_fakes import World, checkpoint, make_world, zipped
from tests.api.conftest import populate, running
from tests.api.keyed import ALL, SCOPED, bearer, begin, entry, keyed_world, token, write_keys

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "access.md"
WRITTEN = {
    tuple(found[1].split(" ", 1)): found[2].split(",")[0]
    for line in PAGE.read_text().splitlines()
    if (found := re.fullmatch(r"\| `([A-Z]+ [^`]*)` \| (public|any key|infer|upload|admin.*) \|", line))
}
"""(method, route) -> what it needs, as the page says."""

PARAMETER = re.compile(r"\{(\w+)(:path)?\}")
ROUTES = sorted({(m, e.template) for e in ENTRIES for m in e.methods.split("|")})


def written(template: str) -> str:
    return PARAMETER.sub(r"{\1}", template)


def address(template: str) -> str:
    return PARAMETER.sub("nothing", template)


def routes_of(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Every route that the application has, whichever way its routers are kept."""
    waiting: list[Any] = list(app.routes)
    while waiting:
        route = waiting.pop()
        inner = getattr(route, "original_router", None)
        if inner is not None:
            waiting += inner.routes
            continue
        assert route.methods, f"{route} answers to no method: say how it is guarded"
        for method in route.methods:
            if method != "HEAD" or "GET" not in route.methods:  # which is asked for as GET
                yield method, route.path


@pytest.fixture(scope="module")
def keyed(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("keyed")
    made = keyed_world(tiny_tokenizer, folder, SCOPED, allow_runtime_lora_updating=True)
    populate(made)
    with running(made):
        yield made


@pytest.fixture(scope="module")
def app(keyed: World) -> FastAPI:
    return create_app(keyed.parts)


def test_the_table_has_every_route_and_no_other(app: FastAPI) -> None:
    assert set(routes_of(app)) == set(ROUTES)


def test_the_page_says_what_the_table_says() -> None:
    told = {(m, written(e.template)): e.need.value for e in ENTRIES for m in e.methods.split("|")}
    assert told == WRITTEN


def may(need: str, key: str) -> bool:
    """What the page means, in other words than the code's."""
    return (
        key
        in {
            "public": ("none", "wrong", *ALL),
            "any key": ALL,
            "infer": ("infer", "admin"),
            "upload": ("upload", "admin"),
            "admin": ("admin",),
        }[need]
    )


@pytest.mark.parametrize("key", ["none", "wrong", *ALL])
async def test_every_route_with_every_kind_of_key(app: FastAPI, key: str) -> None:
    assert len(ROUTES) >= 39
    headers = {} if key == "none" else bearer(key)
    for method, template in ROUTES:
        answer = await begin(app, method, address(template), headers)
        need = WRITTEN[method, written(template)]
        if may(need, key):
            assert answer.status not in (401, 403), (method, template, answer)
            continue
        assert answer.status == (401 if key in ("none", "wrong") else 403), (method, template, answer)
        assert ("www-authenticate" in answer.headers) == (answer.status == 401)
        assert b"plain" not in answer.body


async def test_nothing_happened_that_was_refused(keyed: World, app: FastAPI) -> None:
    before = keyed.catalog.list()
    seen = len(keyed.engine.seen)
    for key in ("none", "wrong", "infer"):
        headers = {} if key == "none" else bearer(key)
        assert (await begin(app, "DELETE", "/adapters/plain", headers)).status in (401, 403)
        assert (await begin(app, "PUT", "/adapters/new", headers, body=zipped(checkpoint()))).status in (401, 403)
    assert (await begin(app, "POST", "/generate", bearer("upload"), body=b'{"inputs": "x"}')).status == 403
    assert keyed.catalog.list() == before
    assert len(keyed.engine.seen) == seen


@pytest.mark.parametrize(
    "path",
    [
        "//metrics", "/metrics/", "/Metrics", "/METRICS", "/metrics;x", "/./metrics", "/x/../metrics",
        "/livez/../metrics",
        "/ui/../metrics", "/%2e%2e/metrics", "/metrics%00", "/metrics\x00", "/metrics ", "metrics", "/ui//../adapters",
        "/adapters/plain/pin/", "/adapters//plain", "/v1//models", "/v1/models/..", "\\metrics",
        "/livez\\..\\metrics", "",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_strange_path_opens_nothing(app: FastAPI, method: str, path: str) -> None:
    """Below /ui/ and nowhere else a path may be anything: it is looked up among the page's files."""
    is_page = path.startswith("/ui/") and method == "GET"
    for headers in ({}, bearer("infer")):
        answer = await begin(app, method, path, headers)
        assert answer.status in ((404,) if is_page else (401, 403, 404, 405)), answer
        assert b"vllm:" not in answer.body
        assert b"residency" not in answer.body


async def test_a_method_that_a_route_has_not_is_no_way_in(app: FastAPI) -> None:
    assert (await begin(app, "HEAD", "/metrics")).status == 401
    assert (await begin(app, "HEAD", "/metrics", bearer("infer"))).status == 403
    assert (await begin(app, "HEAD", "/metrics", bearer("admin"))).body == b""
    for method in ("OPTIONS", "PATCH", "TRACE", "CONNECT", "get", "PROPFIND"):
        assert (await begin(app, method, "/metrics")).status == 401
        assert (await begin(app, method, "/metrics", bearer("admin"))).status == 405


async def test_below_a_root_path_the_same_holds(app: FastAPI) -> None:
    for path, status in (("/metrics", 401), ("/livez", 200), ("/below/metrics", 401)):
        assert (await begin(app, "GET", path)).status == status


async def test_the_key_may_stand_in_two_headers(app: FastAPI) -> None:
    for headers, status in (
        ({"x-api-key": token("infer")}, 200),
        ({"authorization": f"bearer {token('infer')}"}, 200),
        ({"authorization": f"BEARER   {token('infer')} "}, 200),
        ({**bearer("infer"), "x-api-key": token("infer")}, 200),
        ({**bearer("infer"), "x-api-key": token("admin")}, 401),
        ({"authorization": f"Basic {token('infer')}", "x-api-key": token("infer")}, 401),
        ({"authorization": token("infer")}, 401),
        ({"authorization": f"Bearer {token('infer')}x"}, 401),
        ({"authorization": f"Bearer {token('infer')[:-1]}"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Bearer " + "x" * (MAX_TOKEN_CHARS + 1)}, 401),
        ({"authorization": "Bearer \xff\xfe"}, 401),
        ({"x-api-key": ""}, 401),
    ):
        assert (await begin(app, "GET", "/info", headers)).status == status, headers


@pytest.mark.parametrize("name", ["infer", "nobody"])
async def test_a_refusal_names_what_is_wrong_with_the_headers_and_no_key(app: FastAPI, name: str) -> None:
    """Whether a key is known or not, the words are the same."""
    for headers, told in (
        ({**bearer(name), "x-api-key": token("admin")}, "more than one key was sent; send one"),
        ({**bearer(name), "x-api-key": token("nothing")}, "more than one key was sent; send one"),
        ({"authorization": "Bearer"}, "no key in it"),
        ({"authorization": "bearer "}, "no key in it"),
        ({**bearer(name), "x-api-key": ""}, "no key in it"),
        ({"authorization": f"Basic {token(name)}"}, "does not begin with Bearer"),
        ({"authorization": token(name)}, "does not begin with Bearer"),
        ({"authorization": f"Bearer {token(name)}x"}, "not one of this server's"),
    ):
        answer = await begin(app, "GET", "/adapters", headers)
        assert answer.status == 401
        assert told in json.loads(answer.body)["detail"], headers
        assert token(name).encode() not in answer.body


def test_two_headers_of_one_name_are_two_keys() -> None:
    said = [(b"authorization", f"Bearer {token(name)}".encode()) for name in ("infer", "admin")]
    headers = Headers(raw=said)
    assert token_of(headers) is None
    assert "more than one key" in trouble_of(headers)


async def test_errors_speak_the_families_words(app: FastAPI) -> None:
    native = await begin(app, "GET", "/adapters")
    assert json.loads(native.body)["code"] == "unauthorized"
    openai = await begin(app, "POST", "/v1/completions")
    assert json.loads(openai.body)["error"]["type"] == "authentication_error"
    denied = await begin(app, "GET", "/v1/models", bearer("nobody"))
    assert token("nobody").encode() not in denied.body


def test_a_need_is_met_by_its_own_scope() -> None:
    needs = RouteNeeds()
    assert needs.of("GET", "/adapters/x/versions") == {Need.ANY}
    assert needs.of("GET", "/adapters/jobs/x") == {Need.UPLOAD}
    assert needs.of("POST", "/adapters/validate") == {Need.UPLOAD}
    overlapping = RouteNeeds([Entry("GET", "/a/{x}", Need.ANY), Entry("GET", "/{y}/b", Need.ADMIN)])
    assert overlapping.of("GET", "/a/b") == {Need.ANY, Need.ADMIN}, "whichever of them the router takes"
    assert needs.of("DELETE", "/metrics") == frozenset()


async def test_metrics_may_be_made_public(tiny_tokenizer: Any, tmp_path: Path) -> None:
    with running(keyed_world(tiny_tokenizer, tmp_path, SCOPED, metrics_public=True)) as world:
        app = create_app(world.parts)
        for path in ("/metrics", "/metrics/gateway"):
            assert (await begin(app, "GET", path)).status == 200
        assert (await begin(app, "GET", "/adapters")).status == 401


async def test_one_key_of_the_environment_may_do_everything(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_SERVE_API_KEY", token("env"))
    world = make_world(tiny_tokenizer, tmp_path)
    assert token("env") not in repr(world.parts.settings) + world.parts.settings.model_dump_json()
    with running(world):
        app = create_app(world.parts)
        for method, template in (("GET", "/metrics"), ("GET", "/adapters"), ("POST", "/generate")):
            assert (await begin(app, method, template, bearer("env"))).status not in (401, 403)
            assert (await begin(app, method, template)).status == 401


async def test_without_keys_everybody_may_do_everything(world: World) -> None:
    app = create_app(world.parts)
    for method, template in ROUTES:
        assert (await begin(app, method, address(template), bearer("none"))).status not in (401,)
    assert (await begin(app, "GET", "/metrics")).status == 200


async def test_a_key_that_is_withdrawn_is_refused_and_running_answers_end(tiny_tokenizer: Any, tmp_path: Path) -> None:
    with running(keyed_world(tiny_tokenizer, tmp_path, [entry("old"), entry("stays")])) as world:
        path = world.parts.settings.api_keys_file
        assert path is not None
        keyring = Keyring(path=path)
        app = create_app(world.parts, keyring=keyring)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            world.engine.held = True
            body = {"inputs": "a b c", "parameters": {"max_new_tokens": 3}}
            import asyncio

            running_one = asyncio.ensure_future(client.post("/generate", json=body, headers=bearer("old")))
            while not world.engine.seen:
                await asyncio.sleep(0.005)
            write_keys(path, [entry("stays"), entry("fresh")])
            assert keyring.renew()
            world.engine.held = False
            assert (await running_one).status_code == 200
            for name, status in (("old", 401), ("stays", 200), ("fresh", 200)):
                assert (await client.post("/generate", json=body, headers=bearer(name))).status_code == status
            path.write_text("keys: [")
            assert not keyring.renew()
            assert (await client.post("/generate", json=body, headers=bearer("fresh"))).status_code == 200
            page = world.parts.metrics.render().decode()
            assert "peft_serve_api_keys_file_ok 0.0" in page
            assert 'peft_serve_access_refusals_total{reason="unknown"} 1.0' in page
            assert 'peft_serve_tenant_requests_total{outcome="ok",tenant="acme"} 4.0' in page
            assert "psk_" not in page


async def test_the_access_log_tells_the_tenant_and_no_key(
    keyed: World, app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="peft_serve.access")
    await begin(app, "GET", "/info", bearer("infer"))
    await begin(app, "GET", "/info", bearer("nobody"))
    first, second = (record.fields for record in caplog.records)  # type: ignore[attr-defined]
    assert first["tenant"] == "acme"
    assert "tenant" not in second
    assert "psk_" not in str(first) + str(second)


FOREIGN = [
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site", "origin": "http://other.server"},
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://server:81"},
    {"origin": "http://["},
]
OWN: list[dict[str, str]] = [
    {},
    {"sec-fetch-site": "same-origin", "origin": "https://outside.example"},  # behind a proxy that changes Host
    {"sec-fetch-site": "none"},
    {"origin": "http://server"},
    {"origin": "https://chat.example"},
    {"origin": "https://chat.example", "sec-fetch-site": "cross-site"},
]


@pytest.mark.parametrize("has_keys", [True, False])
async def test_pages_of_other_sites_change_nothing(tiny_tokenizer: Any, tmp_path: Path, has_keys: bool) -> None:
    settings: dict[str, Any] = {"allowed_origins": ["https://chat.example"]}
    made = keyed_world(tiny_tokenizer, tmp_path, SCOPED, **settings)
    if not has_keys:
        made = make_world(tiny_tokenizer, tmp_path / "open", **settings)
    with running(made) as world:
        app = create_app(world.parts)
        body = zipped(checkpoint())
        for headers in FOREIGN:
            for method, path in (("PUT", "/adapters/x"), ("DELETE", "/adapters/x"), ("POST", "/generate")):
                answer = await begin(app, method, path, {**bearer("admin"), **headers}, body=body)
                assert (answer.status, b"origin" in answer.body) == (403, True), (headers, method)
            assert (await begin(app, "GET", "/info", {**bearer("admin"), **headers})).status == 200
        assert not world.catalog.list()
        for headers in OWN:
            answer = await begin(app, "PUT", "/adapters/x", {**bearer("admin"), **headers}, body=body)
            assert answer.status in (200, 201), (headers, answer)


async def test_an_allowed_site_may_read_answers_and_refusals(tiny_tokenizer: Any, tmp_path: Path) -> None:
    site = {"origin": "https://chat.example"}
    with running(keyed_world(tiny_tokenizer, tmp_path, SCOPED, allowed_origins=[site["origin"] + "/"])) as world:
        app = create_app(world.parts)
        asked = {**site, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = await begin(app, "OPTIONS", "/generate", asked)
        assert preflight.status == 200
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        for headers, status in ((site, 401), ({**site, **bearer("infer")}, 200)):
            answer = await begin(app, "GET", "/info", headers)
            assert answer.status == status
            assert answer.headers["access-control-allow-origin"] == site["origin"]
        other = await begin(app, "GET", "/info", {"origin": "https://evil.example", **bearer("infer")})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("localhost:8000", True), ("127.0.0.1", True), ("[::1]:8000", True), ("0.0.0.0:8000", True), ("box", True),
        ("app.localhost", True), ("LOCALHOST", True), ("host.docker.internal:8000", True), ("ours.example:1", True),
        ("a.sub.example", True), ("evil.example", False), ("evil.example:8000", False),
        ("127.0.0.1.evil.example", False),
        ("sub.example", False), ("localhost.evil.example.", False), ("[evil.example]", False),
    ],
)  # fmt: skip
async def test_what_comes_in_at_a_loopback_address_names_this_machine(
    tiny_tokenizer: Any, tmp_path: Path, host: str, is_ours: bool
) -> None:
    """Another name that points here is an attacker's, or the operator says that it is not."""
    hosts = ["ours.example", "*.sub.example"] if host.endswith((".example", "example:1")) and is_ours else []
    with running(make_world(tiny_tokenizer, tmp_path, allowed_hosts=hosts)) as world:
        app = create_app(world.parts)
        answer = await begin(app, "GET", "/adapters", {"host": host}, server=("127.0.0.1", 8000))
        assert answer.status == (200 if is_ours else 403)
        outside = await begin(app, "GET", "/adapters", {"host": host}, server=("10.0.0.7", 8000))
        assert outside.status == (200 if is_ours or not hosts else 403), "nobody said how it is called there"


async def test_where_keys_are_asked_for_a_name_gives_no_right(app: FastAPI) -> None:
    headers = {"host": "any.example", **bearer("infer")}
    assert (await begin(app, "GET", "/info", headers, server=("127.0.0.1", 1))).status == 200


def test_one_file_serves_both_readers(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys.yaml", SCOPED)
    assert len(read_keys(path.read_bytes())) == len(Keyring(path=path)) == 3
    assert Keyring().is_open
    assert not Keyring(path=path).is_open
    assert Settings().api_key is None
