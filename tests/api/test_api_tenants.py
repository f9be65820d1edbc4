"""Tenants over HTTP: what each sees, owns and may use, and that nothing tells one of another."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from peft_serve.adapters.sources.opening import Sources
from peft_serve.api.app import create_app
from peft_serve.api.beat import Beat
from peft_serve.api.metrics_view import seen_page
from peft_serve.api.principal import Principal, Reach, Scope, Tenant
from peft_serve.api.seen_catalog import SeenCatalog
from peft_serve.api.service import Service
from peft_serve.core import BASE
from peft_serve.errors import UnknownAdapter
from tests.api.api_fakes import World, checkpoint, zipped
from tests.api.conftest import running
from tests.api.keyed import bearer, begin, entry, keyed_world

KEYS = [
    entry("ann", "a", "infer", "upload", adapters=("a-*", "shared")),
    entry("bob", "b", "infer", "upload", adapters=("b-*", "shared", "a-open"), base=False),
    entry("chief", "a", "admin", adapters=("a-*",)),
    entry("op", "ops", "admin"),
]
FEW = {"max_new_tokens": 2}


@pytest.fixture
def make(tiny_tokenizer: Any, tmp_path: Path) -> Callable[..., World]:
    def made(tenants: dict[str, Any] | None = None, keys: list[Any] = KEYS, **settings: Any) -> World:
        world = keyed_world(tiny_tokenizer, tmp_path, keys, tenants, **settings)
        for name in ("a-one", "b-one", "shared"):
            world.publish(name, checkpoint(name))
        return world

    return made


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server")


def blank(answer: httpx.Response, *names: str) -> tuple[int, dict[str, str], str]:
    """An answer without what differs from request to request, and without the names that were asked for."""
    text = answer.text
    headers = {name: value for name, value in answer.headers.items() if name not in ("x-request-id", "content-length")}
    for name in names:
        text = text.replace(name, "NAME")
    if answer.headers.get("content-type", "").startswith("application/problem"):
        text = json.dumps(json.loads(text) | {"request_id": ""})
    return answer.status_code, headers, text


ASKS: list[tuple[str, str, Any]] = [
    ("POST", "/generate", {"inputs": "x", "adapter": "{}"}),
    ("POST", "/generate", {"inputs": "x", "adapter": "{}@1"}),
    ("POST", "/generate", {"inputs": "x", "adapter": "a-one+{}"}),
    ("POST", "/generate", {"inputs": "x", "adapter": "{}:0.5+a-one:0.5"}),
    ("POST", "/generate", {"inputs": ["x", "y"], "adapter": [None, "{}"]}),
    ("POST", "/generate", {"inputs": "x", "parameters": {"ensemble": ["a-one", "{}"]}}),
    ("POST", "/generate_stream?adapter={}", {"inputs": "x"}),
    ("POST", "/v1/completions", {"prompt": "x", "model": "{}"}),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "model": "{}"}),
    ("POST", "/v1/embeddings", {"input": "x", "model": "{}"}),
    ("POST", "/embed", {"inputs": "x", "adapter": "{}"}),
    ("POST", "/classify", {"inputs": "x", "adapter": "{}"}),
    ("POST", "/tokenize", {"inputs": "x", "adapter_id": "{}"}),
    ("GET", "/adapters/{}", None),
    ("GET", "/adapters/{}/versions", None),
    ("GET", "/adapters/{}/archive", None),
    ("GET", "/adapters/{}@1/archive", None),
    ("GET", "/v1/models/{}", None),
    ("DELETE", "/adapters/{}", None),
    ("POST", "/adapters/{}/rollback", {"version": 1}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "{}"}),
]


@pytest.mark.parametrize(("method", "path", "body"), ASKS)
async def test_what_is_not_seen_is_answered_as_what_is_not_there(
    make: Callable[..., World], method: str, path: str, body: Any
) -> None:
    with running(make(allow_runtime_lora_updating=True)) as world:
        digest = world.adapters["b-one"]
        async with client_of(create_app(world.parts)) as client:
            told = []
            for name in ("b-one", "b-two", "zzz"):
                content = None if body is None else json.loads(json.dumps(body).replace("{}", name))
                answer = await client.request(method, path.replace("{}", name), json=content, headers=bearer("ann"))
                assert answer.status_code == 404, answer.text
                assert digest not in answer.text
                told.append(blank(answer, name))
            assert told[0] == told[1] == told[2]
            pinned = await client.get(f"/adapters/b-one@{digest}/archive", headers=bearer("ann"))
            assert pinned.status_code == 404
            assert [each.name for each in world.catalog.list()] == ["a-one", "b-one", "shared"], "nothing was deleted"


class Counting:
    """A catalog that notes what is looked up."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, act: str) -> Any:
        def noted(name: str, **_: Any) -> Any:
            self.asked.append(f"{act} {len(name)}" if name.startswith("zzz") else act)
            raise UnknownAdapter("none")

        return noted


@pytest.mark.parametrize("act", ["resolve", "get", "versions"])
def test_what_is_not_seen_is_looked_up_like_what_is_not_there(act: str) -> None:
    """By the same call, of a name that nothing can have: the catalog is never asked for the other's."""
    one = Principal(tenant=Tenant(name="a"), scopes=frozenset(Scope), reach=Reach.of(["a-*"]))
    counting = Counting()
    seen = SeenCatalog(counting, one)  # type: ignore[arg-type]
    for name in ("a-none", "b-there"):
        with pytest.raises(UnknownAdapter, match=name if name == "b-there" else "none"):
            getattr(seen, act)(name)
    assert counting.asked == [act, act]


async def test_lists_show_what_the_key_sees(make: Callable[..., World]) -> None:
    with running(make()) as world:
        for adapter in world.adapters.values():
            world.engine.load(adapter)
        async with client_of(create_app(world.parts)) as client:
            for key, names in (
                ("ann", {"a-one", "shared"}),
                ("bob", {"b-one", "shared"}),
                ("chief", {"a-one"}),
                ("op", {"a-one", "b-one", "shared"}),
            ):
                listed = (await client.get("/adapters", headers=bearer(key))).json()["adapters"]
                models = (await client.get("/v1/models", headers=bearer(key))).json()["data"]
                assert {each["name"] for each in listed} == names
                assert {each["id"] for each in models} == names | {world.parts.base.name}


async def test_watchers_see_the_rows_of_their_adapters(make: Callable[..., World]) -> None:
    with running(make()) as world:
        service = Service(world.parts, now=lambda: 0.0, draw_bits=lambda _: 7)
        for name, adapter in world.adapters.items():
            service.learn(adapter, name)
            world.engine.load(adapter)
        one = Principal(tenant=Tenant(name="a"), scopes=frozenset(Scope), reach=Reach.of(["a-*"]))
        beat = Beat(service)
        told = json.loads((await anext(beat.join(one))).removeprefix(b"data:"))
        beat.leave()
        assert [slot["adapter"] for slot in told["slots"]] == ["a-one"]
        assert told["tiers"]["device"]["adapters"] == 3, "sums are the server's"
        app = create_app(world.parts)
        for key, is_there in (("ann", False), ("bob", True), ("op", True)):
            await begin(app, "POST", "/generate", bearer("op"), body=b'{"inputs": "x", "adapter": "b-one"}')
            answer = await begin(app, "GET", "/v1/events", bearer(key))
            assert answer.status == 200
            assert (b"b-one" in answer.body) is is_there or not answer.body


async def test_metrics_of_a_limited_admin_name_nobody_elses(make: Callable[..., World]) -> None:
    with running(make()) as world:
        async with client_of(create_app(world.parts)) as client:
            for key, name in (("ann", "a-one"), ("bob", "b-one"), ("op", "a-one+b-one")):
                body = {"inputs": "x", "adapter": name, "parameters": FEW}
                assert (await client.post("/generate", json=body, headers=bearer(key))).status_code == 200
            for adapter in world.adapters.values():
                world.engine.load(adapter)
            everything = (await client.get("/metrics", headers=bearer("op"))).text
            own = (await client.get("/metrics", headers=bearer("chief"))).text
        for word in ('adapter="a-one"', 'tenant="a"', 'adapter="b-one"', 'tenant="b"', 'adapter="a-one+b-one"'):
            assert word in everything
        assert 'adapter="a-one"' in own
        assert 'tenant="a"' in own
        for word in ("b-one", 'tenant="b"', 'tenant="ops"', "shared"):
            assert word not in own
        assert "vllm:num_requests_running" in own


def test_lists_within_a_label_are_cut_too() -> None:
    one = Principal(tenant=Tenant(name="a"), scopes=frozenset({Scope.ADMIN}), reach=Reach.of(["a-*"]))
    page = (
        b"# HELP x\n"
        b'vllm:lora_requests_info{max_lora="8",running_lora_adapters="a-one,b-one,a-one+b-one",'
        b'waiting_lora_adapters="b-one"} 1.0\n'
        b'peft_serve_adapter_tokens_total{adapter="_other",kind="prompt"} 3.0\n'
        b'peft_serve_adapter_tokens_total{adapter="b\\"a-",kind="prompt"} 3.0\n'
    )
    assert seen_page(page, one).splitlines() == [
        b"# HELP x",
        b'vllm:lora_requests_info{max_lora="8",running_lora_adapters="a-one",waiting_lora_adapters=""} 1.0',
        b'peft_serve_adapter_tokens_total{adapter="_other",kind="prompt"} 3.0',
    ]


async def test_a_key_without_the_base_asks_adapters_only(make: Callable[..., World]) -> None:
    with running(make()) as world:
        async with client_of(create_app(world.parts)) as client:
            for body, status in (({"inputs": "x"}, 403), ({"inputs": "x", "adapter": "b-one"}, 200)):
                answer = await client.post("/generate", json=body, headers=bearer("bob"))
                assert answer.status_code == status
            chat = {"prompt": "x", "model": world.parts.base.name}
            assert (await client.post("/v1/completions", json=chat, headers=bearer("bob"))).status_code == 403
            assert (await client.post("/generate", json={"inputs": "x"}, headers=bearer("ann"))).status_code == 200


async def test_the_engine_is_told_whose_a_request_is(make: Callable[..., World]) -> None:
    with running(make({"a": {"weight": 3}})) as world:
        async with client_of(create_app(world.parts)) as client:
            for key in ("ann", "bob", "chief"):
                body = {"inputs": "x", "adapter": "b-one" if key == "bob" else "a-one", "parameters": FEW}
                assert (await client.post("/generate", json=body, headers=bearer(key))).status_code == 200
        assert [(each.tenant, each.tenant_weight) for each in world.engine.seen] == [("a", 3.0), ("b", 1.0), ("a", 3.0)]


async def put(client: httpx.AsyncClient, name: str, key: str, text: str = "", **query: str) -> httpx.Response:
    content = zipped(checkpoint(text or name))
    return await client.put(f"/adapters/{name}", content=content, params=query, headers=bearer(key))


async def test_uploads_go_to_names_of_the_key(make: Callable[..., World]) -> None:
    with running(make()) as world:
        async with client_of(create_app(world.parts)) as client:
            answers = [await put(client, name, "ann") for name in ("b-one", "b-new", "zzz")]
            assert {each.status_code for each in answers} == {403}
            assert len({str(blank(each)) for each in answers}) == 1, "whether it exists is not told"
            form = {"archive": zipped(checkpoint())}
            answer = await client.post("/adapters", data={"name": "b-one"}, files=form, headers=bearer("ann"))
            assert answer.status_code == 403
            fetch = {"name": "b-one", "source": "file:/srv/adapters/x"}
            assert (await client.post("/adapters", json=fetch, headers=bearer("ann"))).status_code == 403
            assert (await put(client, "a-new", "ann")).status_code == 201
            assert (await put(client, "a-new", "ann", dry_run="1", text="v2")).status_code == 200


async def test_jobs_are_seen_by_those_who_see_the_name(make: Callable[..., World], tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    world = make()
    world.parts = replace(world.parts, sources=Sources([f"file:{tmp_path}/sources"]))
    with running(world):
        app = create_app(world.parts)
        async with app.router.lifespan_context(app), client_of(app) as client:
            fetch = {"name": "a-job", "source": f"file:{tmp_path}/sources/none"}
            begun = await client.post("/adapters", json=fetch, headers=bearer("ann"))
            assert begun.status_code == 202
            where = begun.headers["location"]
            assert (await client.get(where, headers=bearer("ann"))).status_code == 200
            hidden = await client.get(where, headers=bearer("bob"))
            none = await client.get("/adapters/jobs/none", headers=bearer("bob"))
            assert blank(hidden) == blank(none)
            assert hidden.status_code == 404


async def test_a_name_is_changed_by_its_owner_and_by_admins(make: Callable[..., World]) -> None:
    with running(make()) as world:
        async with client_of(create_app(world.parts)) as client:
            assert (await put(client, "a-open", "ann")).status_code == 201
            body = {"inputs": "x", "adapter": "a-open", "parameters": FEW}
            assert (await client.post("/generate", json=body, headers=bearer("bob"))).status_code == 200
            assert (await put(client, "a-open", "bob", text="bobs")).status_code == 403
            for method, path in (("DELETE", "/adapters/a-open"), ("POST", "/adapters/a-open/rollback")):
                assert (await client.request(method, path, headers=bearer("bob"))).status_code == 403
            assert (await put(client, "shared", "ann", text="anns")).status_code == 403, "it is the operator's"
            assert (await put(client, "a-open", "chief", text="v2")).status_code == 201
            assert (await put(client, "a-open", "ann", text="v3")).status_code == 201, "it is still hers"
            shown = {
                key: (await client.get("/adapters/a-open", headers=bearer(key))).json().get("owner")
                for key in ("ann", "bob", "chief", "op")
            }
            assert shown == {"ann": "a", "bob": None, "chief": "a", "op": "a"}
            assert (await client.delete("/adapters/a-open", headers=bearer("ann"))).status_code == 204
            assert (await put(client, "shared", "op", text="ops")).status_code == 201


async def test_a_tenant_keeps_no_more_than_it_may(make: Callable[..., World]) -> None:
    size = sum(map(len, checkpoint("x" * 100).values()))
    with running(make({"a": {"max_adapters": 2, "max_bytes": 3 * size}})) as world:
        async with client_of(create_app(world.parts)) as client:
            for name, text, status in (
                ("a-1", "1" * 100, 201),
                ("a-2", "2" * 100, 201),
                ("a-3", "3" * 100, 403),
                ("a-2", "1" * 100, 201),  # a version with the files of another
                ("a-2", "4" * 100, 201),
                ("a-2", "5" * 100, 403),
                ("a-2", "4" * 100, 200),
            ):
                answer = await put(client, name, "ann", text)
                assert answer.status_code == status, (name, text, answer.text)
                if status == 403:
                    assert answer.json()["code"] == "storage_quota_exceeded"
                    assert "retry-after" not in answer.headers
            assert (await put(client, "a-3", "ann", dry_run="1")).status_code == 403
            assert (await put(client, "b-9", "bob")).status_code == 201, "others have their own"
            assert (await client.delete("/adapters/a-1", headers=bearer("ann"))).status_code == 204
            assert (await put(client, "a-3", "ann", text="3")).status_code == 403, "a-2 has three versions"
            assert (await client.delete("/adapters/a-2", headers=bearer("ann"))).status_code == 204
            assert (await put(client, "a-3", "ann", text="3")).status_code == 201


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


async def test_requests_and_tokens_are_bounded(make: Callable[..., World]) -> None:
    world = make({"a": {"requests_per_s": 2, "burst": 3}, "b": {"tokens_per_min": 60}})
    clock = Clock()
    world.parts = replace(world.parts, clock=clock)
    with running(world):
        async with client_of(create_app(world.parts)) as client:
            told = [(await client.get("/info", headers=bearer("ann"))) for _ in range(5)]
            assert [each.status_code for each in told] == [200, 200, 200, 429, 429]
            assert told[3].headers["retry-after"] == "1"
            assert told[3].json()["code"] == "quota_exceeded"
            assert "requests_per_s" in told[3].json()["error"], "which quota"
            assert (await client.get("/info", headers=bearer("chief"))).status_code == 429, "a key of the same tenant"
            assert (await client.get("/info", headers=bearer("bob"))).status_code == 200
            assert (await client.get("/livez", headers=bearer("ann"))).status_code == 200
            clock.now_s += 0.5
            again = [(await client.get("/info", headers=bearer("ann"))).status_code for _ in range(2)]
            assert again == [200, 429]

            body = {"prompt": "x y z", "model": "b-one", "max_tokens": 70, "ignore_eos": True}
            first = await client.post("/v1/completions", json=body, headers=bearer("bob"))
            used = first.json()["usage"]["total_tokens"]
            assert used > 70
            refused = await client.post("/v1/completions", json=body, headers=bearer("bob"))
            assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
            assert "tokens_per_min" in refused.text
            assert int(refused.headers["retry-after"]) == used - 60 + 1, "a token a second comes back"
            clock.now_s += used - 60 + 1
            assert (await client.post("/v1/completions", json=body, headers=bearer("bob"))).status_code == 200
        page = world.parts.metrics.render().decode()
        assert 'peft_serve_quota_refusals_total{quota="requests_per_s",tenant="a"} 4.0' in page
        assert 'peft_serve_quota_refusals_total{quota="tokens_per_min",tenant="b"} 1.0' in page


async def test_an_answer_that_never_began_costs_nothing(make: Callable[..., World]) -> None:
    with running(make({"a": {"tokens_per_min": 60}})) as world:
        async with client_of(create_app(world.parts)) as client:
            world.engine.fails[BASE] = RuntimeError("broken")
            for _ in range(20):
                answer = await client.post("/generate", json={"inputs": "x " * 20}, headers=bearer("ann"))
                assert answer.status_code == 500
            world.engine.fails.clear()
            assert (await client.post("/generate", json={"inputs": "x"}, headers=bearer("ann"))).status_code == 200


async def test_names_in_metrics_are_bounded_by_the_file(make: Callable[..., World]) -> None:
    with running(make()) as world:
        app = create_app(world.parts)
        for i in range(5):
            await begin(app, "GET", "/info", {"authorization": f"Bearer nobody{i}"})
        assert "nobody" not in world.parts.metrics.render().decode()
        await asyncio.sleep(0)
