"""`/adapters` over a real catalog on a disk; only the gate is a fake."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import httpx
import pytest

from peft_serve.api.app import create_app
from tests.api.api_fakes import BASE_NAME, World, checkpoint, make_world, zipped

ZIP = {"content-type": "application/zip"}


def tarred(files: dict[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(f"folder/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


async def put(client: httpx.AsyncClient, name: str, text: str, **headers: str) -> httpx.Response:
    content = zipped(checkpoint(text))
    return await client.put(f"/adapters/{name}", content=content, headers=ZIP | headers)


async def test_an_upload_is_created_once_and_then_unchanged(client: httpx.AsyncClient, world: World) -> None:
    first = await put(client, "new", "v1")
    body = first.json()
    assert first.status_code == 201
    assert first.headers["etag"] == f'"{body["digest"].replace(":", "-")}"'
    assert (body["name"], body["version"], body["previous"], body["state"]) == ("new", 1, None, "active")
    assert (body["peft_type"], body["rank"], body["num_tensors"], body["num_sites"]) == ("LORA", 8, 4, 2)
    assert body["modules"] == ["q_proj", "v_proj"]
    again = await put(client, "new", "v1")
    assert (again.status_code, again.json()["version"], again.headers["etag"]) == (200, 1, first.headers["etag"])
    second = await put(client, "new", "v2")
    assert (second.status_code, second.json()["version"]) == (201, 2)
    assert second.json()["previous"] == {"version": 1, "digest": body["digest"]}
    answer = await client.post("/generate?adapter=new", json={"inputs": "x"})
    assert answer.json()["adapter"]["digest"] == second.json()["digest"]
    page = (await client.get("/metrics")).text
    assert 'peft_serve_adapter_uploads_total{outcome="created"} 2.0' in page
    assert 'peft_serve_adapter_uploads_total{outcome="unchanged"} 1.0' in page


@pytest.mark.parametrize(
    "kind", ["zip", "nested", "tar", "tar.gz", "form", "form archive", "form tar.gz", "form by file name"]
)
async def test_every_shape_of_an_upload(client: httpx.AsyncClient, kind: str) -> None:
    files = checkpoint("shape")
    digest = (await client.post("/adapters/validate", content=zipped(files), headers=ZIP)).json()["digest"]
    request: dict[str, Any] = {
        "zip": {"content": zipped(files), "headers": ZIP},
        "nested": {"content": zipped(files, folder="checkpoint-100/"), "headers": ZIP},
        "tar": {"content": tarred(files, "w:"), "headers": {"content-type": "application/x-tar"}},
        "tar.gz": {"content": tarred(files, "w:gz"), "headers": {"content-type": "application/gzip"}},
        "form": {"files": {name: (name, content) for name, content in files.items()}},
        "form archive": {"files": {"archive": ("a.zip", zipped(files))}},
        "form tar.gz": {"files": {"archive": ("a.tar.gz", tarred(files, "w:gz"))}},
        "form by file name": {"files": [("files", (f"dir/{name}", content)) for name, content in files.items()]},
    }[kind]
    answer = await client.put("/adapters/shape", **request)
    assert (answer.status_code, answer.json().get("digest")) == (201, digest), answer.text
    if kind.startswith("form"):
        posted = await client.post("/adapters", data={"name": "posted"}, **request)
        assert (posted.status_code, posted.json()["name"]) == (201, "posted")


async def test_preconditions(client: httpx.AsyncClient) -> None:
    tag = (await put(client, "new", "v1", **{"If-None-Match": "*"})).headers["etag"]
    assert (await put(client, "new", "v2", **{"If-None-Match": "*"})).status_code == 412
    assert (await put(client, "new", "v2", **{"If-Match": '"sha256-00"'})).status_code == 412
    assert (await put(client, "new", "v2", **{"If-Match": tag})).status_code == 201
    assert (await put(client, "new", "v3", **{"If-Match": tag})).json()["code"] == "precondition_failed"
    assert (await put(client, "other", "v1", **{"If-Match": "*"})).status_code == 412
    assert (await put(client, "new", "v3", **{"If-None-Match": '"x"'})).status_code == 400
    assert (await client.delete("/adapters/new", headers={"If-Match": tag})).status_code == 412
    assert (await client.delete("/adapters/new", headers={"If-Match": "*"})).status_code == 204


async def test_a_dry_run_keeps_nothing(client: httpx.AsyncClient) -> None:
    content = zipped(checkpoint("v1"))
    answer = await client.put("/adapters/new?dry_run=1", content=content, headers=ZIP)
    assert (answer.status_code, answer.json()["dry_run"]) == (200, True)
    assert (await client.get("/adapters/new")).status_code == 404
    assert (await client.put("/adapters/new?dry_run=perhaps", content=content, headers=ZIP)).status_code == 422


async def test_the_digest_of_the_body_is_checked(client: httpx.AsyncClient) -> None:
    content = zipped(checkpoint("v1"))
    for algorithm, made in (("sha-256", hashlib.sha256), ("sha-512", hashlib.sha512)):
        good = base64.b64encode(made(content).digest()).decode()
        headers = ZIP | {"Content-Digest": f"md5=:AAAA:, {algorithm}=:{good}:"}
        assert (await client.put("/adapters/new", content=content, headers=headers)).status_code in (200, 201)
    bad = base64.b64encode(hashlib.sha256(b"").digest()).decode()
    answer = await client.put("/adapters/x", content=content, headers=ZIP | {"Content-Digest": f"sha-256=:{bad}:"})
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed_upload")
    for nonsense in ("sha-256=xyz", "sha-256=:!!:", "md5=:AAAA:", ""):
        answer = await client.put("/adapters/x", content=content, headers=ZIP | {"Content-Digest": nonsense})
        assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")


async def test_what_is_refused_and_how(client: httpx.AsyncClient) -> None:
    bad = await client.put("/adapters/x", content=zipped(checkpoint("x", bad="rank 900 > 256")), headers=ZIP)
    body = bad.json()
    assert (bad.status_code, body["code"]) == (422, "adapter_invalid")
    assert bad.headers["content-type"] == "application/problem+json"
    assert body["errors"][0] == {"path": "q_proj.lora_A", "reason": "rank 900 > 256"}
    assert body["request_id"] == bad.headers["x-request-id"]
    cases: list[tuple[dict[str, Any], int]] = [
        ({"content": b"no archive", "headers": ZIP}, 400),
        ({"content": b"", "headers": ZIP}, 400),
        ({"content": zipped({"adapter_config.json": b"{}"}), "headers": ZIP}, 400),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415),
        ({"content": zipped(checkpoint("x")), "headers": ZIP | {"content-encoding": "gzip"}}, 415),
        ({"json": {"name": "x", "source": "hf://org/repo"}}, 415),
        ({"content": b"--x\r\nbroken", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400),
        ({"files": {"adapter_config.json": ("a", b"{}")}}, 400),
        ({"files": {"archive": ("a.zip", b"nothing")}}, 400),
    ]
    for request, status in cases:
        answer = await client.put("/adapters/x", **request)
        assert answer.status_code == status, (request, answer.text)
        validated = await client.post("/adapters/validate", **request)
        assert validated.status_code == status, (request, validated.text)
    assert (await client.get("/adapters/x")).status_code == 404
    page = (await client.get("/metrics")).text
    assert 'peft_serve_adapter_uploads_total{outcome="refused"} 0.0' not in page


async def test_a_form_names_the_pickle_that_it_holds(client: httpx.AsyncClient) -> None:
    config = ("adapter_config.json", ("adapter_config.json", checkpoint("x")["adapter_config.json"]))
    pickled = ("files", ("lora/adapter_model.bin", b"PK"))
    with_config, alone = [config, pickled], [pickled]
    refused = await client.put("/adapters/x", files=with_config)
    assert (refused.status_code, refused.json()["code"]) == (400, "malformed_upload")
    assert "holds adapter_model.bin but no adapter_model.safetensors" in refused.json()["detail"]
    assert "adapter_model.bin" in (await client.put("/adapters/x", files=alone)).json()["detail"]
    hub = [("files", ("pytorch_adapter.bin", b"PK")), config]
    assert "use_safetensors=True" in (await client.put("/adapters/x", files=hub)).json()["detail"]
    beside = [("files", (name, b"x")) for name in ("notes.txt", "notes.txt", "")]
    whole = [(name, (name, content)) for name, content in checkpoint("x").items()]
    assert (await client.put("/adapters/x", files=[*whole, *beside])).status_code == 201, "what is not read is no harm"
    stray = [*whole, ("files", ("..", b"x"))]
    assert (await client.put("/adapters/x", files=stray)).status_code == 400, "as in an archive"


@pytest.mark.parametrize(
    "name", ["base", "TGI", "dummy", BASE_NAME, ".hidden", "a" * 65, "a b", "\u00e9", "a@1", "a+b"]
)
async def test_names_that_no_adapter_may_have(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.put(f"/adapters/{name}", content=zipped(checkpoint("x")), headers=ZIP)
    assert (answer.status_code, answer.json()["param"]) == (422, "name")
    form = {"archive": ("a.zip", zipped(checkpoint("x")))}
    assert (await client.post("/adapters", data={"name": name}, files=form)).status_code == 422


async def test_names_in_forms(client: httpx.AsyncClient) -> None:
    form = {"archive": ("a.zip", zipped(checkpoint("x")))}
    assert (await client.post("/adapters", files=form)).json()["param"] == "name"
    assert (await client.put("/adapters/a", data={"name": "b"}, files=form)).status_code == 400
    assert (await client.put("/adapters/a", data={"name": "a"}, files=form)).status_code == 201
    twice = [("archive", ("a.zip", b"x")), ("archive", ("b.zip", b"x"))]
    assert (await client.put("/adapters/a", files=twice)).status_code == 400


async def test_listing_shows_where_each_adapter_is(client: httpx.AsyncClient, world: World) -> None:
    entries = {entry["name"]: entry for entry in (await client.get("/adapters")).json()["adapters"]}
    assert sorted(entries) == ["complaints", "plain", "soft"]
    assert entries["plain"]["residency"] == "disk"
    assert entries["plain"]["pinned"] is False
    assert (await client.post("/adapters/plain/pin")).status_code == 202
    plain = await client.get("/adapters/plain")
    assert (plain.json()["residency"], plain.json()["pinned"]) == ("device", True)
    assert plain.headers["etag"]
    kept = await client.post("/adapters/plain/unload")
    assert (kept.status_code, kept.json()["code"]) == (412, "precondition_failed")
    assert kept.json()["detail"] == "adapter 'plain' is pinned; POST /adapters/plain/unpin first"
    await client.post("/adapters/plain/unpin")
    assert (await client.get("/adapters/plain")).json()["pinned"] is False
    assert (await client.post("/adapters/soft/load")).json()["residency"] == "device"
    assert (await client.post("/adapters/soft/unload")).json()["residency"] == "disk"
    kinds = [kind for kind, _ in world.engine.commands]
    assert kinds == ["load", "pin", "unpin", "load", "unload"]


async def test_a_pin_stays_while_a_name_stands_for_the_files(client: httpx.AsyncClient) -> None:
    form = {"archive": ("a.zip", zipped(checkpoint("twin")))}
    for name in ("one", "two"):
        assert (await client.put(f"/adapters/{name}", files=form)).status_code == 201
    await client.post("/adapters/one/pin")
    assert (await client.delete("/adapters/two")).status_code == 204
    assert (await client.get("/adapters/one")).json()["pinned"] is True
    assert (await client.delete("/adapters/one")).status_code == 204
    assert (await client.put("/adapters/one", files=form)).status_code == 201
    assert (await client.get("/adapters/one")).json()["pinned"] is False


async def test_unknown_names_are_404_everywhere(client: httpx.AsyncClient) -> None:
    assert (await client.get("/adapters/nobody")).status_code == 404
    assert (await client.get("/adapters/nobody/versions")).status_code == 404
    assert (await client.delete("/adapters/nobody")).status_code == 404
    assert (await client.delete("/adapters/nobody", headers={"If-Match": "*"})).status_code == 404
    for method, path in (("GET", ""), ("GET", "/versions"), ("DELETE", ""), ("POST", "/rollback")):
        answer = await client.request(method, f"/adapters/plain@1{path}")
        assert (answer.status_code, answer.json()["detail"]) == (404, "name the adapter without a version here")
    for act in ("pin", "unpin", "load", "unload", "rollback"):
        for name in ("nobody", "nobody@1", "plain@9"):
            answer = await client.post(f"/adapters/{name}/{act}")
            assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found"), (act, name)


async def test_versions_and_rollback(client: httpx.AsyncClient) -> None:
    digests = [(await put(client, "new", text)).json()["digest"] for text in ("v1", "v2", "v3")]
    versions = (await client.get("/adapters/new/versions")).json()["versions"]
    assert [version["digest"] for version in versions] == digests
    back = await client.post("/adapters/new/rollback")
    assert (back.status_code, back.json()["version"]) == (200, 2)
    assert (await client.get("/adapters/new")).json()["digest"] == digests[1]
    assert (await client.post("/adapters/new/rollback", json={"version": 3})).json()["digest"] == digests[2]
    for body, status in (({"version": 9}, 404), ({"version": "1"}, 422), ({"version": True}, 422), ([], 422)):
        assert (await client.post("/adapters/new/rollback", json=body)).status_code == status
    assert (await client.post("/adapters/plain/rollback")).json()["code"] == "not_found"
    large = await client.post("/adapters/new/rollback", content=b" " * 70_000)
    assert (large.status_code, large.json()["code"]) == (413, "payload_too_large"), "it is no upload"


async def test_delete_waits_for_those_that_run(client: httpx.AsyncClient, world: World) -> None:
    import asyncio

    assert (await client.delete("/adapters/soft")).status_code == 204
    assert (await client.get("/adapters/soft")).status_code == 404
    world.engine.held = True
    running = asyncio.create_task(client.post("/generate?adapter=plain", json={"inputs": "x"}))
    while not world.engine.num_live:
        await asyncio.sleep(0.005)
    deleted = await client.delete("/adapters/plain")
    assert (deleted.status_code, deleted.json()) == (202, {"name": "plain", "state": "draining", "in_flight": 1})
    assert (await client.post("/generate?adapter=plain", json={"inputs": "x"})).status_code == 404
    world.engine.held = False
    assert (await running).json()["adapter"]["name"] == "plain"
    assert ("unload", world.adapters["plain"]) in world.engine.commands


async def test_an_upload_beyond_the_limit_is_refused_while_it_is_read(world: World) -> None:
    from dataclasses import replace

    from peft_serve.config import Settings

    parts = replace(world.parts, settings=Settings(max_adapter_bytes=1000))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=create_app(parts)), base_url="http://s") as client:
        content = zipped(checkpoint("x" * 2000))
        answer = await client.put("/adapters/x", content=content, headers=ZIP)
        assert (answer.status_code, answer.json()["code"]) == (413, "payload_too_large")

        async def endless() -> Any:
            for _ in range(10_000):
                yield b"x" * 65536

        answer = await client.put("/adapters/x", content=endless(), headers=ZIP)
        assert answer.status_code == 413


async def test_folders_are_served_read_only(tiny_tokenizer: Any, tmp_path: Path) -> None:
    for name, files in (("good", checkpoint("good")), ("bad", checkpoint("bad", bad="no such module"))):
        (tmp_path / "shipped" / name).mkdir(parents=True)
        for file, content in files.items():
            (tmp_path / "shipped" / name / file).write_bytes(content)
    world = make_world(tiny_tokenizer, tmp_path, folders=[tmp_path / "shipped"])
    world.engine.start()
    transport = httpx.ASGITransport(app=create_app(world.parts))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        listed = (await client.get("/adapters")).json()["adapters"]
        assert [(entry["name"], entry["version"]) for entry in listed] == [("bad", None), ("good", None)]
        good = (await client.get("/adapters/good")).json()
        assert (good["version"], good["peft_type"], good["read_only"]) == (0, "LORA", True)
        bad = (await client.get("/adapters/bad")).json()
        assert (bad["state"], bad["version"]) == ("refused", None)
        assert "no such module" in bad["problem"]
        refused = await client.post("/generate?adapter=bad", json={"inputs": "x"})
        assert (refused.status_code, refused.json()["code"]) == (422, "adapter_invalid")
        assert refused.json()["error_type"] == "validation"
        assert refused.json()["detail"].startswith("adapter 'bad' does not fit the base model served here: q_proj")
        assert refused.json()["errors"][0] == {"path": "q_proj.lora_A", "reason": "no such module"}
        assert "retry-after" not in refused.headers
        openai = await client.post("/v1/completions", json={"model": "bad", "prompt": "x"})
        assert (openai.status_code, openai.json()["error"]["code"]) == (400, "adapter_invalid")
        (tmp_path / "shipped" / "bad" / "adapter_model.safetensors").unlink()
        broken = await client.post("/generate?adapter=bad", json={"inputs": "x"})
        assert (broken.status_code, broken.json()["code"]) == (503, "adapter_unavailable")
        assert broken.json()["error_type"] == "generation"
        assert "retry-after" not in broken.headers
        assert (await client.post("/generate?adapter=good", json={"inputs": "x"})).headers["x-adapter-version"] == "0"
        assert (await client.delete("/adapters/good")).status_code == 403
        models = (await client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in models] == [BASE_NAME, "good"]
    world.engine.stop()


async def test_pins_leave_one_slot_to_everybody_else(client: httpx.AsyncClient, world: World) -> None:
    for i in range(8):  # as many as there are slots
        assert (await put(client, f"kept-{i}", f"number {i}")).status_code == 201
    answers = [await client.post(f"/adapters/kept-{i}/pin") for i in range(8)]
    assert [answer.status_code for answer in answers] == [202] * 7 + [412]
    assert "--max-resident-adapters" in answers[-1].json()["detail"]
    assert (await client.post("/adapters/kept-0/pin")).status_code == 202, "it has its slot already"
    assert (await client.get("/adapters/kept-0")).json()["pinned"]


async def test_a_pin_is_the_files_and_not_the_names(client: httpx.AsyncClient, world: World) -> None:
    first = (await put(client, "moving", "one")).json()["digest"]
    await client.post("/adapters/moving/pin")
    second = (await put(client, "moving", "two")).json()["digest"]
    assert (await client.get("/adapters/moving")).json()["pinned"] is False
    assert world.engine.snapshot().pinned == {first}
    kept = await client.post("/adapters/moving@1/unload")
    assert kept.status_code == 412
    told = await client.post("/adapters/moving/pin")
    assert (told.json()["version"], told.json()["pinned"]) == (2, True)
    unpinned = await client.post("/adapters/moving@1/unpin")
    assert (unpinned.status_code, unpinned.json()["version"]) == (202, 2), "the answer is about the name"
    assert world.engine.snapshot().pinned == {second}
    assert (await client.post(f"/adapters/moving@{first}/load")).status_code == 202
    assert world.engine.commands[-1] == ("load", first)
