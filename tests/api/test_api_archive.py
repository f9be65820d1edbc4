"""`GET /adapters/{name}/archive`: a version's files, in the order of their digest."""

from __future__ import annotations

import asyncio
import io
import socket
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from peft_serve.adapters.archive import read_upload
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.api.adapter_archive import MAX_DOWNLOADS
from peft_serve.core import AdapterId
from tests.adapters.store.store_fakes import corrupt
from tests.api.api_fakes import World, checkpoint


async def test_the_files_of_a_version_come_back_as_they_were_sent(client: httpx.AsyncClient, world: World) -> None:
    first = world.adapters["complaints"]
    world.publish("complaints", checkpoint("newer"))
    answer = await client.get("/adapters/complaints@1/archive")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-tar"
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.headers["etag"] == f'"{first.replace(":", "-")}"'
    assert answer.headers["x-adapter-version"] == "1"
    assert answer.headers["content-disposition"] == 'attachment; filename="complaints-1.tar"'
    assert read_upload(answer.content, "application/x-tar").digest() == first
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        assert archive.getnames() == ["adapter_config.json", "adapter_model.safetensors", "peft_serve.json"]
    assert (await client.get("/adapters/complaints/archive")).headers["x-adapter-version"] == "2"


async def test_who_has_it_already_gets_nothing(client: httpx.AsyncClient) -> None:
    tag = (await client.get("/adapters/plain/archive")).headers["etag"]
    again = await client.get("/adapters/plain/archive", headers={"if-none-match": tag})
    assert (again.status_code, again.content) == (304, b"")


async def test_an_unknown_name_is_404(client: httpx.AsyncClient) -> None:
    for name in ("nobody", "plain@9", "..%2F..%2Fetc"):
        assert (await client.get(f"/adapters/{name}/archive")).status_code == 404


async def test_what_is_deleted_before_its_files_are_read_is_not_called_damaged(
    client: httpx.AsyncClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, between = world.catalog.files, list[Callable[[], object]]()

    def files(adapter: AdapterId) -> CheckpointFiles:
        while between:
            between.pop(0)()
        return read(adapter)

    monkeypatch.setattr(world.catalog, "files", files)
    between.append(lambda: world.catalog.changes.delete("plain"))
    gone = await client.get("/adapters/plain/archive")
    assert (gone.status_code, gone.json()["code"]) == (404, "model_not_found")
    between.append(lambda: world.catalog.changes.delete("complaints"))
    between.append(lambda: world.publish("complaints", checkpoint("another")))
    another = await client.get("/adapters/complaints/archive")
    digest = read_upload(another.content, "application/x-tar").digest()
    assert (another.status_code, digest) == (200, world.adapters["complaints"])
    assert another.headers["etag"] == f'"{digest.replace(":", "-")}"'
    assert another.headers["x-adapter-version"] == "2"


async def test_what_is_damaged_is_called_so(client: httpx.AsyncClient, world: World, tmp_path: Path) -> None:
    corrupt(tmp_path / "store", world.adapters["plain"])
    answer = await client.get("/adapters/plain/archive")
    assert (answer.status_code, answer.json()["code"]) == (503, "adapter_unavailable")


async def test_what_adapterhub_saved_can_be_uploaded_again(client: httpx.AsyncClient, world: World) -> None:
    files = checkpoint("hub")
    files["adapter_config.json"] = b'{"config": {"architecture": "lora"}, "name": "hub"}'
    adapter = world.publish("hub", files)
    answer = await client.get("/adapters/hub/archive")
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        assert archive.getnames() == ["adapter_config.json", "adapter.safetensors"]
    assert read_upload(answer.content, "application/x-tar").digest() == adapter


async def test_downloads_at_the_same_time_are_few_and_end_with_their_clients(url: str, world: World) -> None:
    files = checkpoint("large")
    files["adapter_model.safetensors"] = bytes(64 << 20)  # more than the sockets on the way hold
    world.publish("large", files)
    parts = urlsplit(url)
    slow = [socket.create_connection((parts.hostname, parts.port)) for _ in range(MAX_DOWNLOADS)]
    for each in slow:
        each.sendall(b"GET /adapters/large/archive HTTP/1.1\r\nhost: x\r\n\r\n")
        assert await asyncio.to_thread(each.recv, 12) == b"HTTP/1.1 200"
    async with httpx.AsyncClient(base_url=url) as client:
        busy = await client.get("/adapters/plain/archive")
        assert (busy.status_code, busy.json()["code"]) == (429, "overloaded")
        assert "retry-after" in busy.headers
        for each in slow:
            each.close()
        deadline = time.monotonic() + 10
        while (await client.get("/adapters/plain/archive")).status_code == 429:
            assert time.monotonic() < deadline, "a client that left frees its place"
            await asyncio.sleep(0.02)
