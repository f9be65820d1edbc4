"""A store in trouble, over HTTP: what serves goes on serving, and what cannot be done is said in the right words."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from peft_serve.adapters.alias_record import Target
from peft_serve.adapters.catalog import Catalog
from peft_serve.adapters.filesystem import DiskFileSystem
from peft_serve.adapters.folders import CheckpointFolders
from peft_serve.adapters.ownership import Publisher
from peft_serve.adapters.store import AdapterStore
from peft_serve.api.app import create_app
from peft_serve.api.principal import ANYONE
from peft_serve.api.prompts import LONG_TEXT_CHARS
from peft_serve.api.resolving import Resolver
from peft_serve.api.splitting import Draws
from peft_serve.api.store_threads import StoreThreads
from peft_serve.core import AdapterId
from peft_serve.errors import Forbidden, Unavailable, UnknownAdapter
from tests.api.api_fakes import BASE_NAME, World, checkpoint, fake_gate, make_world, zipped
from tests.api.conftest import running

ZIP = {"content-type": "application/zip"}
CHANGES = frozenset({"make_dir", "write", "sync_file", "sync_dir", "rename", "remove_file", "remove_tree", "lock"})


class TroubledDisk(DiskFileSystem):
    """The real one, until `error` says what it answers to changes, or `hangs` that reads do not come back."""

    def __init__(self) -> None:
        self.error: int | None = None
        self.free = 1 << 40
        self.answers = threading.Event()
        self.answers.set()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name in CHANGES and self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        return found

    def read(self, path: Path) -> bytes:
        assert self.answers.wait(20), "the test is over"
        return super().read(path)

    def free_bytes(self, path: Path) -> int:
        return self.free


@pytest.fixture
def disk() -> Iterator[TroubledDisk]:
    made = TroubledDisk()
    yield made
    made.answers.set()


@dataclass(frozen=True)
class Troubled:
    """A server whose store is on the disk, and how to start another one over what is there."""

    world: World
    disk: TroubledDisk
    root: Path

    def restarted(self) -> World:
        return _world(self.world, AdapterStore(self.root, self.disk, min_free_bytes=1000), self.disk)


def _world(made: World, store: AdapterStore, disk: TroubledDisk) -> World:
    catalog = Catalog(
        store,
        CheckpointFolders([], disk, base_name=BASE_NAME),
        fake_gate,
        checked_for="test",
        base_name=BASE_NAME,
        now=lambda: datetime(2026, 1, 2, tzinfo=UTC),
    )
    return World(parts=replace(made.parts, catalog=catalog), engine=made.engine, catalog=catalog)


@pytest.fixture
def troubled(tiny_tokenizer: Any, tmp_path: Path, disk: TroubledDisk) -> Iterator[Troubled]:
    """`warm` and `cold`, and the server that they were uploaded to is gone."""
    root = tmp_path / "troubled"
    store = AdapterStore(root, disk)
    made = _world(make_world(tiny_tokenizer, tmp_path), store, disk)
    for name in ("warm", "cold"):
        made.publish(name, checkpoint(name))
    store.close()
    with running(made):
        yield Troubled(made, disk, root)


@pytest.fixture
def world(troubled: Troubled) -> World:
    return troubled.restarted()


@asynccontextmanager
async def served(world: World) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(world.parts)
    transport = httpx.ASGITransport(app=app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://server") as c:
        yield c


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with served(world) as made:
        yield made


async def ask(client: httpx.AsyncClient, name: str) -> httpx.Response:
    return await client.post(f"/generate?adapter={name}", json={"inputs": "x", "parameters": {"max_new_tokens": 2}})


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        (errno.ENOSPC, 507, "no room left"),
        (errno.EDQUOT, 507, "no room left"),
        (errno.EROFS, 503, "read-only"),
        (errno.EIO, 503, "may be failing"),
    ],
    ids=lambda value: errno.errorcode.get(value, "") if isinstance(value, int) else "",
)
async def test_a_store_that_takes_no_writes_serves_on(
    client: httpx.AsyncClient, disk: TroubledDisk, code: int, status: int, words: str, tmp_path: Path
) -> None:
    disk.error = code
    upload = zipped(checkpoint("v2"))
    refusals = [
        await client.put("/adapters/new", content=upload, headers=ZIP),
        await client.put("/adapters/warm", content=upload, headers=ZIP),
        await client.delete("/adapters/warm"),
        await client.post("/adapters/warm/pin"),
    ]
    for refusal in refusals:
        body = refusal.json()
        assert (refusal.status_code, words in body["detail"]) == (status, True), body
        assert str(tmp_path) not in refusal.text
        assert ("retry-after" in refusal.headers) == (status == 503)
    assert (await ask(client, "warm")).status_code == 200
    listed = (await client.get("/adapters")).json()["adapters"]
    assert [(entry["name"], entry["version"]) for entry in listed] == [("cold", 1), ("warm", 1)]
    disk.error = None
    assert (await client.put("/adapters/new", content=upload, headers=ZIP)).status_code == 201
    assert list((tmp_path / "troubled" / "tmp").iterdir()) == []


async def test_uploads_leave_room_for_deletes(client: httpx.AsyncClient, disk: TroubledDisk) -> None:
    disk.free = 1100
    refused = await client.put("/adapters/new", content=zipped(checkpoint("v2")), headers=ZIP)
    assert (refused.status_code, refused.json()["code"]) == (507, "store_full")
    assert (await client.delete("/adapters/cold")).status_code == 204


async def test_a_disk_that_does_not_answer_keeps_only_those_who_need_it(world: World, disk: TroubledDisk) -> None:
    resolver = Resolver(world.catalog, BASE_NAME, patience_s=0.3)

    async def resolve(name: str) -> AdapterId:
        served = await asyncio.wait_for(resolver.resolve([name], ANYONE, Draws("", lambda _: 0)), 10)
        resolver.release(served[name])
        return served[name].parts[0].resolved.id

    warm = await resolve("warm")
    disk.answers.clear()
    cold = [asyncio.create_task(resolve("cold")) for _ in range(20)]  # more than there are threads
    await asyncio.sleep(0.1)
    for _ in range(50):
        assert await resolve("warm") == warm
    assert not any(task.done() for task in cold)
    for refusal in await asyncio.gather(*cold, return_exceptions=True):
        assert isinstance(refusal, Unavailable)
        assert (refusal.retry_after_s, "does not answer" in refusal.message) == (30.0, True)
    disk.answers.set()
    found = await resolve("cold")
    for _ in range(500):
        if not world.catalog.in_flight(found):
            break
        await asyncio.sleep(0.01)
    assert world.catalog.in_flight(found) == 0, "what came too late was given back"
    world.catalog.check()


async def test_a_server_starts_on_a_read_only_store_and_serves(troubled: Troubled) -> None:
    troubled.disk.error = errno.EROFS
    async with served(troubled.restarted()) as client:
        assert (await ask(client, "cold")).status_code == 200
        refused = await client.put("/adapters/new", content=zipped(checkpoint("v2")), headers=ZIP)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "30")
        assert (await client.post("/adapters/warm/pin")).status_code == 202, "until the server stops"


@pytest.mark.parametrize("is_at_start", [True, False], ids=["at the start", "since"])
async def test_of_a_change_that_cannot_be_made_the_store_is_told_first(troubled: Troubled, is_at_start: bool) -> None:
    """Whoever did as a 409, a 412 or a 422 says would only hear the next reason."""
    async with served(troubled.world):
        troubled.world.catalog.aliases.put("best", [Target(adapter="warm")])
    troubled.disk.error = errno.EROFS if is_at_start else None
    world = troubled.restarted()
    async with served(world) as client:
        troubled.disk.error = errno.EROFS
        moved, upload = {"if-match": '"sha256-00"'}, zipped(checkpoint("v2"))
        targets = {"targets": [{"adapter": "warm"}]}
        refusals = [
            await client.delete("/adapters/warm"),
            await client.delete("/adapters/warm?force=1"),
            await client.delete("/adapters/cold", headers=moved),
            await client.put("/adapters/cold", content=upload, headers=ZIP | moved),
            await client.put("/adapters/cold", content=upload, headers=ZIP | {"if-none-match": "*"}),
            await client.put("/adapters/best", content=upload, headers=ZIP),
            await client.put("/adapters/new", content=zipped(checkpoint("v2", peft_type="NO")), headers=ZIP),
            await client.put("/aliases/cold", json=targets),
            await client.put("/aliases/best", json=targets, headers=moved),
            await client.delete("/aliases/best", headers=moved),
        ]
        for refusal in refusals:
            assert (refusal.status_code, "is read-only" in refusal.json()["detail"]) == (503, True), refusal.text
            assert refusal.headers["retry-after"] == "30"
        for path in ("/adapters/nobody", "/aliases/nobody"):
            assert (await client.delete(path)).status_code == 404, "there is nothing to be changed"
        with pytest.raises(UnknownAdapter):
            world.catalog.changes.rollback("nobody", 1)
        with pytest.raises(Forbidden):
            world.catalog.changes.publish("warm", checkpoint("v2"), publisher=Publisher(tenant="t", is_operator=False))
        for path, status in (("cold", 412), ("best", 409)):
            looked = await client.put(f"/adapters/{path}?dry_run=1", content=upload, headers=ZIP | moved)
            assert looked.status_code == status, "what changes nothing is looked at all the same"
    assert sorted(path.name for path in (troubled.root / "tmp").iterdir()) == []


async def test_a_store_that_can_be_written_is_not_blamed(client: httpx.AsyncClient, tmp_path: Path) -> None:
    upload = zipped(checkpoint("v2"))
    assert (await client.put("/aliases/best", json={"targets": [{"adapter": "warm"}]})).status_code == 201
    assert (await client.put("/adapters/best", content=upload, headers=ZIP)).status_code == 409
    assert (await client.put("/adapters/cold", content=upload, headers=ZIP | {"if-match": '"x"'})).status_code == 412
    assert (await client.delete("/adapters/warm")).status_code == 409
    assert list((tmp_path / "troubled" / "tmp").iterdir()) == []


async def test_pins_come_back_with_the_server(client: httpx.AsyncClient, world: World) -> None:
    assert (await client.post("/adapters/warm/pin")).status_code == 202
    assert (await client.post("/adapters/cold/pin")).status_code == 202
    await client.post("/adapters/cold/unpin")
    world.engine.resident.clear()
    async with served(world) as again:
        for _ in range(200):
            if (await again.get("/adapters/warm")).json()["pinned"]:
                break
            await asyncio.sleep(0.01)
        pinned = {entry["name"]: entry["pinned"] for entry in (await again.get("/adapters")).json()["adapters"]}
        assert pinned == {"warm": True, "cold": False}
        assert (await again.delete("/adapters/warm")).status_code == 204
    assert world.catalog.pins.all() == {}


async def test_calls_that_wait_for_a_disk_keep_nobody_else(
    client: httpx.AsyncClient, world: World, disk: TroubledDisk
) -> None:
    """More of them than there are threads anywhere, and none of those that prompts and metrics need."""
    assert (await ask(client, "warm")).status_code == 200
    disk.answers.clear()
    calls = [("GET", "/adapters"), ("GET", "/adapters/cold"), ("GET", "/adapters/cold/archive"), ("GET", "/v1/models")]
    calls += [("POST", "/adapters/cold/rollback"), ("DELETE", "/adapters/cold"), ("GET", "/aliases")]
    waiting = [asyncio.create_task(client.request(*call)) for call in calls * 8]
    await asyncio.sleep(0.1)
    for path in ("/livez", "/readyz", "/health", "/metrics"):
        assert (await asyncio.wait_for(client.get(path), 10)).status_code == 200, path
    long = {"inputs": "word " * (LONG_TEXT_CHARS // 5 + 1), "parameters": {"max_new_tokens": 1, "truncate": 4}}
    for _ in range(3):
        answer = await asyncio.wait_for(client.post("/generate?adapter=warm", json=long), 10)
        assert answer.status_code == 200, answer.text
    assert sum(not task.done() for task in waiting) > 8, "so many wait that one pool would be used up"
    disk.answers.set()
    for answer in await asyncio.gather(*waiting):  # 429: downloads; and a slow machine may outlast a call's patience
        is_told = answer.status_code == 503 and "the adapter store does not answer" in answer.text
        assert answer.status_code in {200, 204, 404, 429} or is_told, answer.text
    world.catalog.check()


async def test_who_finds_no_thread_in_time_is_told_so_and_what_has_begun_is_waited_for() -> None:
    threads, opened, ran = StoreThreads(num_threads=2, patience_s=0.1), threading.Event(), list[int]()

    def hang(number: int) -> int:
        ran.append(number)
        assert opened.wait(20), "the test is over"
        return number

    calls = [asyncio.create_task(threads.run(hang, number)) for number in range(5)]
    done, begun = await asyncio.wait(calls, timeout=0.5)
    assert (len(done), len(begun), ran) == (3, 2, [0, 1])
    for task in done:
        error = task.exception()
        assert isinstance(error, Unavailable)
        assert (error.retry_after_s, "does not answer" in error.message) == (30.0, True)
    gone = begun.pop()
    gone.cancel()
    await asyncio.wait([gone])
    opened.set()
    assert [await task for task in begun] == [calls.index(task) for task in begun]
    assert await asyncio.gather(*(threads.run(hang, number) for number in range(10, 20))) == list(range(10, 20))
    assert sorted(ran) == [0, 1, *range(10, 20)], "what was refused was not done"
    with pytest.raises(ZeroDivisionError):
        await threads.run(divmod, 1, 0)
