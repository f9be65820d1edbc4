"""Aliases over HTTP: what they point to, who is drawn, what stays when things go, and what a key sees of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from peft_serve.adapters.alias_record import Revision, Target
from peft_serve.adapters.catalog import Catalog
from peft_serve.adapters.filesystem import DiskFileSystem
from peft_serve.adapters.folders import CheckpointFolders
from peft_serve.adapters.store import AdapterStore
from peft_serve.api.app import create_app
from peft_serve.errors import Conflict
from tests.api.api_fakes import BASE_NAME, World, checkpoint, checkpoint_files, fake_gate, make_world, zipped
from tests.api.conftest import http, running
from tests.api.keyed import bearer, entry, keyed_world


def to(*targets: tuple[str, int | None, float]) -> dict[str, Any]:
    return {"targets": [{"adapter": a, "version": v, "weight": w} for a, v, w in targets]}


@pytest.fixture
async def split(client: httpx.AsyncClient, world: World) -> httpx.AsyncClient:
    """`prod` is version 1 of `plain` for nine of ten requests, version 2 for the others."""
    world.publish("plain", checkpoint("better"))
    world.adapters["first"] = world.catalog.versions("plain")[0].id
    made = await client.put("/aliases/prod", json=to(("plain", 1, 90), ("plain", 2, 10)))
    assert (made.status_code, made.headers["etag"]) == (201, '"r1"')
    return client


async def drawn(client: httpx.AsyncClient, name: str = "prod", **headers: str) -> int:
    """The version that a request gets."""
    asked = {"inputs": "x", "parameters": {"max_new_tokens": 1}}
    answer = await client.post(f"/generate?adapter={name}", json=asked, headers=headers)
    assert answer.status_code == 200, answer.text
    body = answer.json()["adapter"]
    assert answer.headers["x-adapter-version"] == str(body["version"])
    assert (answer.headers["x-adapter"], answer.headers["x-adapter-alias"]) == (body["name"], name)
    return int(body["version"])


async def test_a_target_may_be_written_as_requests_write_it(split: httpx.AsyncClient) -> None:
    made = await split.put("/aliases/other", json={"targets": [{"adapter": "plain@2", "weight": 1}]})
    assert made.status_code == 201, made.text
    assert made.json()["targets"][0]["version"] == 2
    both = {"targets": [{"adapter": "plain@2", "version": 1}]}
    assert (await split.put("/aliases/other", json=both)).status_code == 404


async def test_requests_are_split_by_weight_and_each_says_who_answered(split: httpx.AsyncClient) -> None:
    found = Counter([await drawn(split, **{"x-session-id": f"s{i}"}) for i in range(200)])
    assert set(found) == {1, 2}
    assert 6 <= found[2] <= 36, "10 % of 200, within four standard deviations"
    page = (await split.get("/metrics")).text
    for version, count in found.items():
        labels = f'adapter="plain",alias="prod",outcome="ok",version="{version}"'
        assert f"peft_serve_alias_requests_total{{{labels}}} {float(count)}" in page


async def test_a_session_keeps_its_version_and_only_the_moved_share_changes_it(split: httpx.AsyncClient) -> None:
    names = [f"user-{i}" for i in range(60)]
    before = {name: await drawn(split, **{"x-session-id": name}) for name in names}
    assert before == {name: await drawn(split, **{"x-session-id": name}) for name in names}
    assert (await split.put("/aliases/prod", json=to(("plain", 1, 50), ("plain", 2, 50)))).status_code == 200
    after = {name: await drawn(split, **{"x-session-id": name}) for name in names}
    assert {(before[name], after[name]) for name in names} == {(1, 1), (1, 2), (2, 2)}


async def test_the_user_of_a_body_is_a_session_too(split: httpx.AsyncClient) -> None:
    async def asked(user: str, **headers: str) -> str:
        body = {"model": "prod", "prompt": "x", "max_tokens": 1, "user": user}
        answer = await split.post("/v1/completions", json=body, headers=headers)
        assert answer.json()["model"] == "prod"
        return answer.headers["x-adapter-version"]

    got = {f"u{i}": await asked(f"u{i}") for i in range(40)}
    assert set(got.values()) == {"1", "2"}
    for user, version in got.items():
        assert await asked(user) == version
        assert await asked("somebody", **{"x-session-id": user}) == version, "the header goes first"
    chat = {"model": "prod", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "user": "u0"}
    assert (await split.post("/v1/chat/completions", json=chat)).headers["x-adapter-version"] == got["u0"]
    assert (await split.get("/info", headers={"x-session-id": "s" * 257})).status_code == 200
    assert (await split.post("/generate", json={"inputs": "x"}, headers={"x-session-id": "s" * 257})).status_code == 422


async def test_without_a_session_chance_draws_once_for_a_call(world: World) -> None:
    world.publish("plain", checkpoint("better"))
    draws: list[int] = []
    asked: list[int] = []

    def draw_bits(count: int) -> int:
        if count != 53:
            return len(asked) + len(draws)
        asked.append(count)
        return draws.pop(0)

    app = create_app(world.parts, now=lambda: 0.0, draw_bits=draw_bits)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as client:
        await client.put("/aliases/prod", json=to(("plain", 1, 90), ("plain", 2, 10)))
        draws += [0, int(0.8999 * 2**53), int(0.9001 * 2**53), 2**53 - 1]
        assert [await drawn(client) for _ in range(4)] == [1, 1, 2, 2]
        draws.append(2**53 - 1)
        many = {"inputs": ["x", "y", "z"], "adapter": "prod", "parameters": {"max_new_tokens": 1}}
        answers = (await client.post("/generate", json=many)).json()
        assert [answer["adapter"]["version"] for answer in answers] == [2, 2, 2]
        assert draws == []


async def test_a_name_without_a_version_follows_it(client: httpx.AsyncClient, world: World) -> None:
    assert (await client.put("/aliases/prod", json={"targets": [{"adapter": "plain"}]})).status_code == 201
    assert await drawn(client) == 1
    world.publish("plain", checkpoint("better"))
    assert await drawn(client) == 2
    await client.post("/adapters/plain/rollback", json={"version": 1})
    assert await drawn(client) == 1


async def test_an_alias_is_listed_beside_adapters_and_models(split: httpx.AsyncClient) -> None:
    (listed,) = (await split.get("/adapters")).json()["aliases"]
    assert (listed["name"], listed["revision"]) == ("prod", 1)
    assert [(t["adapter"], t["version"], t["share"]) for t in listed["targets"]] == [
        ("plain", 1, 0.9),
        ("plain", 2, 0.1),
    ]
    assert (await split.get("/aliases")).json()["aliases"] == [listed]
    models = [card["id"] for card in (await split.get("/v1/models")).json()["data"]]
    assert models == [BASE_NAME, "complaints", "plain", "soft", "prod"]
    assert (await split.get("/v1/models/prod")).json()["id"] == "prod"
    shown = await split.get("/aliases/prod")
    assert (shown.json()["targets"], shown.headers["etag"]) == (listed["targets"], '"r1"')


async def test_revisions_roll_back_and_count_up(split: httpx.AsyncClient) -> None:
    assert (await split.put("/aliases/prod", json=to(("plain", 2, 1)))).json()["revision"] == 2
    again = await split.put("/aliases/prod", json=to(("plain", 2, 1)))
    assert (again.status_code, again.json()["revision"]) == (200, 2), "the same targets are no new revision"
    assert await drawn(split) == 2
    back = (await split.post("/aliases/prod/rollback")).json()
    assert (back["revision"], [t["weight"] for t in back["targets"]]) == (1, [90, 10])
    assert (await split.post("/aliases/prod/rollback")).status_code == 404
    assert (await split.post("/aliases/prod/rollback", json={"revision": 2})).json()["revision"] == 2
    assert (await split.post("/aliases/prod/rollback", json={"revision": 9})).status_code == 404
    assert (await split.post("/aliases/prod/rollback", json={"revision": "2"})).status_code == 422
    third = await split.put("/aliases/prod", json=to(("soft", None, 1)))
    assert third.json()["revision"] == 3
    assert [each["revision"] for each in third.json()["revisions"]] == [1, 2, 3]
    assert (await split.delete("/aliases/prod")).status_code == 204
    assert (await split.put("/aliases/prod", json=to(("soft", None, 1)))).json()["revision"] == 4


async def test_a_change_may_be_bound_to_a_revision(split: httpx.AsyncClient) -> None:
    elsewhere = to(("soft", None, 1))
    assert (await split.put("/aliases/prod", json=elsewhere, headers={"if-match": '"r7"'})).status_code == 412
    assert (await split.delete("/aliases/prod", headers={"if-match": '"r7"'})).status_code == 412
    assert (await split.put("/aliases/new", json=elsewhere, headers={"if-match": "*"})).status_code == 412
    assert (await split.put("/aliases/prod", json=elsewhere, headers={"if-match": '"r1"'})).status_code == 200
    assert (await split.delete("/aliases/prod", headers={"if-match": '"r2"'})).status_code == 204


async def test_a_target_is_deleted_only_on_purpose(split: httpx.AsyncClient, world: World) -> None:
    await split.put("/aliases/mixed", json=to(("plain", None, 3), ("soft", None, 1)))
    refused = await split.delete("/adapters/plain")
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert "?force=1" in refused.json()["detail"]
    assert world.catalog.get("plain").num_versions == 2
    assert (await split.delete("/adapters/plain?force=1")).status_code == 204
    assert (await split.get("/aliases/prod")).status_code == 404, "it had no other target"
    left = (await split.get("/aliases/mixed")).json()
    assert [t["adapter"] for t in left["targets"]] == ["soft"]
    assert (await split.post("/aliases/mixed/rollback", json={"revision": 1})).status_code == 404, "its target is gone"
    assert (await split.post("/generate?adapter=prod", json={"inputs": "x"})).status_code == 404


async def test_a_request_ends_on_the_version_that_it_drew(split: httpx.AsyncClient, world: World) -> None:
    world.engine.held = True
    await split.put("/aliases/prod", json=to(("plain", 1, 1)))
    asked = {"inputs": "x", "parameters": {"max_new_tokens": 3}, "stream": False}
    running_one = asyncio.ensure_future(split.post("/generate?adapter=prod", json=asked))
    while not world.engine.num_live:
        await asyncio.sleep(0.001)
    await split.put("/aliases/prod", json=to(("plain", 2, 1)))
    deleted = await split.delete("/adapters/plain?force=1")
    assert (deleted.status_code, deleted.json()["in_flight"]) == (202, 1)
    world.engine.held = False
    answer = await running_one
    assert (answer.status_code, answer.json()["adapter"]["version"]) == (200, 1)
    assert answer.json()["adapter"]["alias"] == "prod"
    assert world.catalog.in_flight(world.adapters["first"]) == 0


async def test_a_name_is_an_adapter_or_an_alias(split: httpx.AsyncClient, world: World) -> None:
    taken = await split.put("/aliases/plain", json=to(("soft", None, 1)))
    assert (taken.status_code, taken.json()["code"]) == (409, "conflict")
    with pytest.raises(Conflict, match="'prod' is an alias"):
        world.catalog.changes.publish("prod", checkpoint_files(checkpoint("x")))
    assert (await split.put("/aliases/other", json=to(("prod", None, 1)))).status_code == 404
    assert (await split.put("/aliases/base", json=to(("plain", None, 1)))).status_code == 422
    assert (await split.get("/adapters/prod")).status_code == 404
    assert (await split.post("/adapters/prod/pin")).status_code == 404
    assert (await split.post("/generate?adapter=prod@1", json={"inputs": "x"})).status_code == 404
    assert (await split.delete("/adapters/prod")).status_code == 404
    assert (await split.delete("/aliases/plain")).status_code == 404


async def test_an_alias_is_a_part_of_an_expression(split: httpx.AsyncClient) -> None:
    await split.put("/aliases/prod", json=to(("plain", 2, 1)))
    answer = (await split.post("/generate?adapter=prod:0.5%2Bcomplaints", json={"inputs": "x"})).json()["adapter"]
    assert [(part["name"], part["version"]) for part in answer["parts"]] == [("plain", 2), ("complaints", 1)]
    assert answer["parts"][0]["alias"] == "prod"
    twice = await split.post("/generate?adapter=prod%2Bplain@2", json={"inputs": "x"})
    assert twice.status_code == 422


BAD = [
    {},
    {"targets": []},
    {"targets": "plain"},
    {"targets": [{}]},
    {"targets": [{"adapter": 3}]},
    {"targets": [{"adapter": "plain", "weight": -1}]},
    {"targets": [{"adapter": "plain", "weight": True}]},
    {"targets": [{"adapter": "plain", "weight": 2e6}]},
    {"targets": [{"adapter": "plain", "weight": 0}]},
    {"targets": [{"adapter": "plain", "version": 1.5}]},
    {"targets": [{"adapter": "plain", "version": -1}]},
    {"targets": [{"adapter": "plain"}, {"adapter": "plain"}]},
    {"targets": [{"adapter": "plain", "percent": 3}]},
    {"targets": [{"adapter": "plain", "version": i} for i in range(17)]},
    {"targets": [{"adapter": "plain"}], "weight": 3},
]


@pytest.mark.parametrize("body", BAD, ids=str)
async def test_what_is_no_list_of_targets_is_refused(client: httpx.AsyncClient, body: Any) -> None:
    assert (await client.put("/aliases/prod", json=body)).status_code == 422
    assert (await client.get("/aliases")).json() == {"aliases": []}


@pytest.mark.parametrize(
    "target", [("nobody", None), ("plain", 2), ("plain", 0), ("../plain", None), ("plain@9", None)]
)
async def test_a_target_that_is_not_there_is_refused(client: httpx.AsyncClient, target: tuple[str, int | None]) -> None:
    assert (await client.put("/aliases/prod", json=to((*target, 1)))).status_code == 404
    assert (await client.get("/aliases/prod")).status_code == 404


async def test_aliases_survive_a_restart(tiny_tokenizer: Any, tmp_path: Path) -> None:
    world = make_world(tiny_tokenizer, tmp_path)
    world.publish("plain", checkpoint("plain"))
    with running(world):
        async with http(world) as client:
            await client.put("/aliases/prod", json=to(("plain", 1, 2.5)))
            await client.put("/aliases/prod", json=to(("plain", None, 1)))
            await client.post("/aliases/prod/rollback")
            await client.put("/aliases/gone", json=to(("plain", None, 1)))
            await client.delete("/aliases/gone")
    fs = DiskFileSystem()
    world.catalog._store.close()
    again = Catalog(
        AdapterStore(tmp_path / "store", fs),
        CheckpointFolders([], fs, base_name=BASE_NAME),
        fake_gate,
        checked_for="test",
        base_name=BASE_NAME,
        now=lambda: datetime(2026, 1, 2, tzinfo=UTC),
    )
    (alias,) = again.aliases.all()
    assert (alias.name, alias.now.number) == ("prod", 1)
    assert [each.targets for each in alias.revisions.kept] == [
        (Target(adapter="plain", version=1, weight=2.5),),
        (Target(adapter="plain"),),
    ]
    again.check()


async def test_a_key_sees_an_alias_with_all_its_targets(tiny_tokenizer: Any, tmp_path: Path) -> None:
    keys = [
        entry("ann", "a", "infer", "upload", adapters=("a-*", "shared")),
        entry("bob", "b", "infer", "upload", adapters=("b-*", "shared", "a-alias", "a-both")),
        entry("op", "ops", "admin"),
    ]
    world = keyed_world(tiny_tokenizer, tmp_path, keys, {"a": {"max_adapters": 2}})
    for name in ("a-one", "shared"):
        world.publish(name, checkpoint(name))
    with running(world):
        async with http(world) as client:

            async def ask(who: str, method: str, path: str, **body: Any) -> httpx.Response:
                return await client.request(method, path, headers=bearer(who), **body)

            assert (await ask("ann", "PUT", "/aliases/a-alias", json=to(("shared", None, 1)))).status_code == 201
            both = to(("shared", None, 1), ("a-one", None, 1))
            assert (await ask("ann", "PUT", "/aliases/a-both", json=both)).status_code == 201
            full = await ask("ann", "PUT", "/aliases/a-third", json=both)
            assert (full.status_code, full.json()["code"]) == (403, "storage_quota_exceeded")
            assert (await ask("ann", "PUT", "/aliases/b-x", json=both)).status_code == 403, "not one of its names"
            hidden = await ask("bob", "PUT", "/aliases/b-leak", json=to(("a-one", None, 1)))
            missing = await ask("bob", "PUT", "/aliases/b-leak", json=to(("a-two", None, 1)))
            assert hidden.status_code == missing.status_code == 404
            assert hidden.json()["detail"].replace("one", "two") == missing.json()["detail"]
            listed = (await ask("bob", "GET", "/aliases")).json()["aliases"]
            assert [(each["name"], "owner" in each) for each in listed] == [("a-alias", False)]
            assert (await ask("bob", "GET", "/aliases/a-both")).status_code == 404
            asked = {"inputs": "x", "parameters": {"max_new_tokens": 1}}
            assert (await ask("bob", "POST", "/generate?adapter=a-alias", json=asked)).status_code == 200
            assert (await ask("bob", "POST", "/generate?adapter=a-both", json=asked)).status_code == 404
            assert (await ask("bob", "DELETE", "/aliases/a-alias")).status_code == 403, "it is ann's"
            assert (await ask("bob", "PUT", "/aliases/a-alias", json=to(("shared", 1, 1)))).status_code == 403
            assert (await ask("op", "DELETE", "/aliases/a-alias")).status_code == 204
            owners = [each["owner"] for each in (await ask("op", "GET", "/aliases")).json()["aliases"]]
            assert owners == ["a"]


async def test_aliases_of_others_neither_hinder_an_owner_nor_are_taken_from_them(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    keys = [
        entry("ann", "a", "infer", "upload", adapters=("a-*",)),
        entry("bob", "b", "infer", "upload", adapters=("b-*", "a-open")),
        entry("op", "ops", "admin"),
    ]
    world = keyed_world(tiny_tokenizer, tmp_path, keys, {})
    with running(world):
        async with http(world) as client:

            async def ask(who: str, method: str, path: str, **body: Any) -> httpx.Response:
                return await client.request(method, path, headers=bearer(who), **body)

            for name in ("a-open", "a-two"):
                content = zipped(checkpoint(name))
                assert (await ask("ann", "PUT", f"/adapters/{name}", content=content)).status_code == 201
            assert (await ask("bob", "PUT", "/aliases/b-x", json=to(("a-open", None, 1)))).status_code == 201
            assert (await ask("ann", "PUT", "/aliases/a-x", json=to(("a-two", None, 1)))).status_code == 201
            refused = await ask("ann", "DELETE", "/adapters/a-two")
            assert (refused.status_code, "an alias points" in refused.json()["detail"]) == (409, True)
            assert (await ask("ann", "DELETE", "/adapters/a-open")).status_code == 204
            assert [alias.name for alias in world.catalog.aliases.all()] == ["a-x", "b-x"]
            asked = {"inputs": "x", "parameters": {"max_new_tokens": 1}}
            assert (await ask("bob", "POST", "/generate?adapter=b-x", json=asked)).status_code == 404
            assert (await ask("bob", "DELETE", "/aliases/b-x")).status_code == 204
            assert (await ask("ann", "DELETE", "/adapters/a-two?force=1")).status_code == 204
            assert not world.catalog.aliases.all()


async def test_an_operator_takes_an_adapter_out_of_everybodys_aliases(tiny_tokenizer: Any, tmp_path: Path) -> None:
    keys = [entry("ann", "a", "infer", "upload", adapters=("a-*", "shared")), entry("op", "ops", "admin")]
    world = keyed_world(tiny_tokenizer, tmp_path, keys, {})
    world.publish("shared", checkpoint("shared"))
    with running(world):
        async with http(world) as client:
            made = await client.put("/aliases/a-x", json=to(("shared", None, 1)), headers=bearer("ann"))
            assert made.status_code == 201
            assert (await client.delete("/adapters/shared", headers=bearer("op"))).status_code == 409
            assert (await client.delete("/adapters/shared?force=1", headers=bearer("op"))).status_code == 204
            assert not world.catalog.aliases.all()


def test_points_fall_into_targets_by_weight() -> None:
    targets = (Target(adapter="a", weight=0), Target(adapter="b", weight=3), Target(adapter="c", weight=1))
    revision = Revision(number=1, created="", targets=(*targets, Target(adapter="d", weight=0)))
    found = [revision.target_at(i / 1000).adapter for i in range(1000)]
    assert Counter(found) == {"b": 750, "c": 250}
    assert revision.target_at(1 - 2**-53).adapter == "c"
