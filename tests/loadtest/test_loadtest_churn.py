"""Churn, single acts and names that move, against fake servers."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from loadtest.acts import sender, unload
from loadtest.churn import Act, Churn, churning, rounds
from loadtest.moving import MovingName, moving, token_ids
from loadtest.trace import TraceRequest


def request(index: int, *, tokens: int = 3) -> TraceRequest:
    return TraceRequest(index=index, arrival_s=0.0, adapter="x", text=" abe", prompt_tokens=1, max_new_tokens=tokens)


def checkpoint(folder: Path, number: int) -> Path:
    folder = folder / f"v{number}"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"version": number}))
    return folder


def test_a_round_uploads_uploads_over_uploads_the_same_and_deletes() -> None:
    first = list(itertools.islice(rounds([b"one", b"two", b"three"]), 6))
    assert [act[0] for acts in first[:3] for act in acts] == [
        *("upload", "ask", "upload over it", "ask", "upload the same", "delete")
    ]
    assert [sum(act[0].startswith("upload") for act in acts) for acts in first] == [1] * 6, "one a turn"
    bodies = [acts[0][3] for acts in first]
    assert bodies == [b"one", b"two", b"two", b"three", b"one", b"one"]
    assert {act[2].split("?")[0] for act in first[0] + first[2]} == {"/adapters/churn-0", "/generate"}
    assert first[3][0][2] == "/adapters/churn-1"


def test_churn_goes_on_beside_a_block_and_ends_with_it(fake_server: Any, tmp_path: Path) -> None:
    folders = [checkpoint(tmp_path, number) for number in range(2)]
    with churning(sender(fake_server.url), folders, every_s=0.01) as churn:
        while churn.num_uploads < 4:
            time.sleep(0.005)
    assert churn.num_failed == 0
    assert "churn-0" in fake_server.uploads
    assert "DELETE /adapters/churn-0" in fake_server.acts
    assert "POST /generate" in fake_server.acts
    before = len(churn.acts)
    assert len(fake_server.acts) + churn.num_uploads == before, "every act has reached the server, and none after"


def test_refusals_and_silence_are_failed_acts() -> None:
    acts = [Act(what="upload", status=status, seconds=0.0) for status in (200, 201, 422, 0)]
    assert Churn(acts=acts).num_failed == 2
    assert sender("http://127.0.0.1:9")("DELETE", "/adapters/x", None, "application/json") == 0


def test_unloading_says_what_was_refused(fake_server: Any) -> None:
    send = sender(fake_server.url)
    unload(send, ["a", "b"])
    assert fake_server.acts == ["POST /adapters/a/unload", "POST /adapters/b/unload"]
    with pytest.raises(RuntimeError, match="missing was not unloaded: the server answered 404"):
        unload(send, ["missing"])


@dataclass
class Versions:
    """Answers with the version that a name had when the request came, slowly; `forgets` answers with the newest."""

    forgets: bool = False
    version: int = -1
    log: list[str] = field(default_factory=list)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**24)
        app.router.add_put("/adapters/moving", self.put)
        app.router.add_delete("/adapters/moving", self.delete)
        app.router.add_post("/generate_stream", self.stream)
        return app

    async def put(self, asked: web.Request) -> web.Response:
        with zipfile.ZipFile(io.BytesIO(await asked.read())) as archive:
            self.version = json.loads(archive.read("adapter_config.json"))["version"]
        self.log.append(f"put {self.version}")
        return web.json_response({})

    async def delete(self, asked: web.Request) -> web.Response:
        self.log.append("delete")
        return web.json_response({})

    async def stream(self, asked: web.Request) -> web.StreamResponse:
        count = (await asked.json())["parameters"]["max_new_tokens"]
        version = self.version
        self.log.append(f"ask {version}")
        response = web.StreamResponse()
        await response.prepare(asked)
        for _ in range(count):
            await asyncio.sleep(0.02)
            said = self.version if self.forgets else version
            await response.write(b"data:" + json.dumps({"token": {"id": said}}).encode() + b"\n\n")
        self.log.append(f"end {version}")
        return response


def test_a_name_moves_under_each_request(serve: Callable[[web.Application], str], tmp_path: Path) -> None:
    folders, server = [checkpoint(tmp_path, number) for number in range(3)], Versions()
    found = list(MovingName(serve(server.app()), folders).play([request(n) for n in range(4)]))
    assert [one.tokens for one in found] == [(0,) * 3, (1,) * 3, (2,) * 3, (0,) * 3]
    assert [one.adapter.name for one in found] == ["v0", "v1", "v2", "v0"]
    assert server.log[:4] == ["put 0", "ask 0", "put 1", "end 0"], "moved while the request runs"
    assert server.log.count("delete") == 1


def test_a_server_that_forgets_which_version_it_began_with_is_caught(
    serve: Callable[[web.Application], str], tmp_path: Path
) -> None:
    folders = [checkpoint(tmp_path, number) for number in range(3)]
    (one,) = MovingName(serve(Versions(forgets=True).app()), folders).play([request(0, tokens=4)])
    assert one.adapter.name == "v0"
    assert set(one.tokens) != {0}


def test_what_a_moving_name_meets_is_told_at_the_end(tmp_path: Path) -> None:
    nobody = MovingName("http://127.0.0.1:9", [checkpoint(tmp_path, 0)])
    with pytest.raises(RuntimeError, match="could not be played"), moving(nobody, [request(0)]):
        pass


def test_token_ids_leave_errors_out() -> None:
    assert token_ids([b'{"token":{"id":5}}', b'{"token":{"id":7}}', b'{"error":"gone"}']) == (5, 7)
