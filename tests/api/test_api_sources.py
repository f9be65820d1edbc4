"""Adapters that the server fetches by itself: by POST /adapters, by vLLM's routes, and from watched folders."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from peft_serve.adapters.sources.opening import Sources
from peft_serve.api.app import create_app
from tests.api.api_fakes import World, checkpoint, make_world, zipped
from tests.api.conftest import http, running

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
Make = Callable[..., World]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of two checkpoints, and of one that is refused."""
    root = tmp_path / "adapters"
    for name, files in {"one": checkpoint("one"), "two": checkpoint("two"), "bad": checkpoint("b", bad="no")}.items():
        put(root / name, files)
    return root


def put(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.fixture
def make(tiny_tokenizer: Any, tmp_path: Path, root: Path) -> Iterator[Make]:
    """Makes a world that may fetch from `root`."""
    with ExitStack() as closing:

        def made(*patterns: str, **settings: Any) -> World:
            world = make_world(tiny_tokenizer, tmp_path, **settings)
            world.parts = replace(world.parts, sources=Sources(patterns or (f"file:{root}",)))
            return closing.enter_context(running(world))

        yield made


@pytest.fixture
async def client(make: Make) -> AsyncIterator[httpx.AsyncClient]:
    async with http(make()) as made:
        yield made


async def ended(client: httpx.AsyncClient, answer: httpx.Response) -> dict[str, Any]:
    """The job that an answer names, when it has ended."""
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/adapters/jobs/{answer.json()['id']}"
    for _ in range(1000):
        job: dict[str, Any] = (await client.get(answer.headers["location"])).json()
        if job["state"] in ("done", "failed"):
            return job
        await asyncio.sleep(0.005)
    raise AssertionError(job)


async def fetch(client: httpx.AsyncClient, name: str, source: str, **headers: str) -> dict[str, Any]:
    answer = await client.post("/adapters", json={"name": name, "source": source}, headers=headers)
    return await ended(client, answer)


async def test_a_source_becomes_a_version(client: httpx.AsyncClient, root: Path) -> None:
    job = await fetch(client, "new", f"file:{root}/one")
    assert (job["state"], job["outcome"], job["error"]) == ("done", "created", None)
    assert job["bytes"] == job["total_bytes"] > 0
    adapter = job["adapter"]
    assert (adapter["name"], adapter["version"], adapter["tried"]) == ("new", 1, True)
    assert adapter["source"] == job["source"] == "file:adapters/one"
    assert (await client.get("/adapters/new")).json()["source"] == "file:adapters/one"
    assert (await client.post("/generate?adapter=new", json={"inputs": "x"})).status_code == 200

    again = await fetch(client, "new", f"file:{root}/one")
    assert (again["outcome"], again["adapter"]["version"]) == ("unchanged", 1)
    assert again["id"] != job["id"]
    second = await fetch(client, "new", f"file:{root}/two")
    assert (second["outcome"], second["adapter"]["version"], second["source"]) == ("created", 2, "file:adapters/two")
    upload = await client.put("/adapters/new", content=zipped(checkpoint("three")))
    assert (upload.status_code, upload.json()["source"]) == (201, None)
    versions = (await client.get("/adapters/new/versions")).json()["versions"]
    assert [each["source"] for each in versions] == ["file:adapters/one", "file:adapters/two", None]
    page = (await client.get("/metrics")).text
    assert 'peft_serve_adapter_uploads_total{outcome="created"} 3.0' in page
    assert 'peft_serve_adapter_uploads_total{outcome="unchanged"} 1.0' in page


async def test_a_fetch_that_fails_leaves_nothing_and_says_why(client: httpx.AsyncClient, root: Path) -> None:
    refused = await fetch(client, "bad", f"file:{root}/bad")
    assert (refused["state"], refused["adapter"], refused["outcome"]) == ("failed", None, None)
    assert (refused["error"]["status"], refused["error"]["code"]) == (422, "adapter_invalid")
    assert refused["error"]["errors"][0] == {"path": "q_proj.lora_A", "reason": "no"}
    missing = await fetch(client, "missing", f"file:{root}/nothing")
    assert (missing["error"]["status"], missing["error"]["code"]) == (404, "not_found")
    assert (await client.get("/adapters")).json() == {"adapters": [], "aliases": [], "problems": []}


async def test_create_only_and_names(client: httpx.AsyncClient, root: Path) -> None:
    await fetch(client, "new", f"file:{root}/one")
    taken = await fetch(client, "new", f"file:{root}/two", **{"If-None-Match": "*"})
    assert taken["error"]["status"] == 412
    for name in ("base", "a/b", ""):
        answer = await client.post("/adapters", json={"name": name, "source": f"file:{root}/one"})
        assert (answer.status_code, answer.json()["param"]) == (422, "name")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"name": "x", "source": "file:/etc"}, 403, "--allow-source"),
        ({"name": "x", "source": "hf://org/repo"}, 403, "--allow-source"),
        ({"name": "x", "source": "http://169.254.169.254/latest"}, 422, "begins with"),
        ({"name": "x", "source": "file:../x"}, 422, "whole path"),
        ({"name": "x", "source": 7}, 422, "source"),
        ({"name": "x"}, 422, "source"),
        ({"source": "file:/x"}, 422, "name"),
        ({"name": "x", "source": "file:/x", "token": "hf_x"}, 422, "token"),
    ],
)
async def test_what_is_not_fetched(client: httpx.AsyncClient, body: dict[str, Any], status: int, words: str) -> None:
    answer = await client.post("/adapters", json=body)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["detail"]


async def test_a_body_that_is_no_body(client: httpx.AsyncClient, root: Path) -> None:
    body = {"name": "x", "source": f"file:{root}/one"}
    assert (await client.post("/adapters?dry_run=1", json=body)).status_code == 400
    assert (await client.post("/adapters", json=body, headers={"If-Match": "*"})).status_code == 400
    json_type = {"content-type": "application/json"}
    assert (await client.post("/adapters", content=b"{", headers=json_type)).status_code == 422
    assert (await client.post("/adapters", content=b"[" * 70_000, headers=json_type)).status_code == 413
    for said in ({}, body):
        put = await client.put("/adapters/x", json=said)
        assert (put.status_code, put.json()["code"]) == (415, "unsupported_media_type")
        assert "POST {name, source} to /adapters" in put.json()["detail"]
    assert (await client.get("/adapters/jobs/none")).status_code == 404


async def test_nothing_is_fetched_unless_it_is_allowed(world: World, root: Path) -> None:
    async with http(world) as client:
        answer = await client.post("/adapters", json={"name": "x", "source": f"file:{root}/one"})
    assert answer.status_code == 403
    assert "fetches no adapters" in answer.json()["detail"]


async def test_an_adapter_may_be_called_jobs(client: httpx.AsyncClient, root: Path) -> None:
    await fetch(client, "jobs", f"file:{root}/one")
    assert (await client.get("/adapters/jobs")).json()["name"] == "jobs"
    assert (await client.get("/adapters/jobs/versions")).json()["name"] == "jobs"


# vLLM's routes


@pytest.fixture
async def updating(make: Make, root: Path) -> AsyncIterator[httpx.AsyncClient]:
    world = make(f"file:{root}", "s3://bucket", allow_runtime_lora_updating=True)
    async with http(world) as made:
        yield made


async def load(client: httpx.AsyncClient, name: str, path: str, **more: Any) -> httpx.Response:
    return await client.post(LOAD, json={"lora_name": name, "lora_path": path, **more})


async def test_load_and_unload_as_vllm_does(updating: httpx.AsyncClient, root: Path) -> None:
    loaded = await load(updating, "sql", f"{root}/one")
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
    assert "sql" in [card["id"] for card in (await updating.get("/v1/models")).json()["data"]]
    body = {"model": "sql", "prompt": "x", "max_tokens": 2}
    assert (await updating.post("/v1/completions", json=body)).status_code == 200

    again = await load(updating, "sql", f"{root}/two")
    assert again.status_code == 400
    words = "The lora adapter 'sql' has already been loaded. If you want to load the adapter in place, set "
    error = {"message": f"{words}'load_inplace' to True.", "type": "InvalidUserInput", "param": None, "code": 400}
    assert again.json() == {"error": error}
    assert (await load(updating, "sql", f"{root}/two", load_inplace=True)).status_code == 200
    assert (await updating.get("/adapters/sql")).json()["version"] == 2

    gone = await updating.post(UNLOAD, json={"lora_name": "sql", "lora_int_id": None})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'sql' removed successfully.")
    twice = await updating.post(UNLOAD, json={"lora_name": "sql"})
    assert twice.status_code == 404
    error = {"message": "The lora adapter 'sql' cannot be found.", "type": "NotFoundError", "param": None, "code": 404}
    assert twice.json() == {"error": error}
    assert (await updating.post("/v1/completions", json=body)).status_code == 404


async def test_two_that_load_one_name_at_once(updating: httpx.AsyncClient, root: Path) -> None:
    answers = await asyncio.gather(*[load(updating, "sql", f"{root}/{name}") for name in ("one", "two")])
    assert sorted(answer.status_code for answer in answers) == [200, 400]


@pytest.mark.parametrize(
    ("body", "status", "kind", "words"),
    [
        ({"lora_name": "x"}, 400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided."),
        ({"lora_name": "", "lora_path": "/x"}, 400, "InvalidUserInput", "must be provided"),
        ({"lora_name": 7, "lora_path": "/x"}, 400, "BadRequestError", "a string is needed"),
        ({"lora_name": "x", "lora_path": "/etc"}, 403, "PermissionDeniedError", "--allow-source"),
        ({"lora_name": "x", "lora_path": "org/repo"}, 403, "PermissionDeniedError", "hf://org/repo"),
        ({"lora_name": "x", "lora_path": "http://host/x"}, 400, "BadRequestError", "begins with"),
        ({"lora_name": "base", "lora_path": "s3://bucket/x"}, 400, "BadRequestError", "reserved"),
        ({"lora_name": "x", "lora_path": "ROOT/none"}, 404, "NotFoundError", "no such folder"),
        ({"lora_name": "x", "lora_path": "ROOT/bad"}, 400, "BadRequestError", "q_proj.lora_A: no"),
    ],
)
async def test_what_vllms_load_refuses(
    updating: httpx.AsyncClient, root: Path, body: dict[str, Any], status: int, kind: str, words: str
) -> None:
    content = json.dumps(body).replace("ROOT", str(root))
    answer = await updating.post(LOAD, content=content, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (status, status, kind)
    assert words in error["message"]
    assert (await updating.get("/adapters")).json()["adapters"] == []


async def test_unload_needs_a_name_and_leaves_a_folders_adapter(make: Make, root: Path) -> None:
    async with http(make(allow_runtime_lora_updating=True)) as client:
        answer = await client.post(UNLOAD, json={})
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "InvalidUserInput")
        assert (await client.post(UNLOAD, content=b"{")).status_code == 400


async def test_vllms_routes_are_off_unless_switched_on(client: httpx.AsyncClient, root: Path) -> None:
    for route, body in ((LOAD, {"lora_name": "x", "lora_path": f"{root}/one"}), (UNLOAD, {"lora_name": "x"})):
        answer = await client.post(route, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, 403)
        assert "--allow-runtime-lora-updating" in answer.json()["error"]["message"]


# watched folders


async def test_a_watched_folder_from_first_to_last(make: Make, tmp_path: Path) -> None:
    incoming = tmp_path / "incoming"
    incoming.mkdir()
    options = {"watch": [incoming], "watch_interval_s": 0.02, "watch_settle_s": 0.1, "watch_removes": True}
    world = make(**options)
    app = create_app(world.parts)
    before = threading.active_count()
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as client,
    ):

        async def until(wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
            for _ in range(500):
                page: dict[str, Any] = (await client.get("/adapters")).json()
                if wanted(page):
                    return page
                await asyncio.sleep(0.02)
            raise AssertionError(page)

        put(tmp_path / "made", checkpoint("one"))
        (tmp_path / "made").rename(incoming / "one")
        page = await until(lambda page: bool(page["adapters"]))
        (adapter,) = page["adapters"]
        assert (adapter["name"], adapter["version"], adapter["source"]) == ("one", 1, "watch:incoming/one")
        assert (await client.post("/generate?adapter=one", json={"inputs": "x"})).status_code == 200
        put(incoming / "one", checkpoint("two"))
        await until(lambda page: page["adapters"][0]["version"] == 2)
        put(incoming / "bad", checkpoint("b", bad="has rank 900"))
        page = await until(lambda page: bool(page["problems"]))
        assert page["problems"][0]["source"] == "watch:incoming/bad"
        assert "has rank 900" in page["problems"][0]["problem"]
        for name in ("one", "bad"):
            shutil.rmtree(incoming / name)
        page = await until(lambda page: not page["adapters"] and not page["problems"])
    for _ in range(100):
        if threading.active_count() <= before:
            break
        await asyncio.sleep(0.02)
    assert "folder-watch" not in {thread.name for thread in threading.enumerate()}
