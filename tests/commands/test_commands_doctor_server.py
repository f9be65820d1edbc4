"""`peft-serve doctor --url`: what is wrong with a server that runs."""

from __future__ import annotations

import itertools
from pathlib import Path

import httpx
import pytest

from peft_serve.commands.checkup.server import look_at_server
from peft_serve.commands.link import ServerLink
from peft_serve.engine.snapshot import EngineState
from peft_serve.errors import AdapterUnavailable
from tests.api.api_fakes import World
from tests.commands.checkup_fakes import bad
from tests.commands.conftest import run


def test_a_server_that_is_well(url: str) -> None:
    said = run("doctor", "--url", url)
    assert said.code == 0, said.out
    assert "nothing is wrong" in said.out


def test_a_server_that_is_not_there() -> None:
    said = run("doctor", "--url", "http://127.0.0.1:1")
    assert said.code == 1
    assert "no server answers" in said.out


def test_a_key_that_is_not_for_this_is_no_wrong_address() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path in ("/health", "/readyz"):
            return httpx.Response(200, json={})
        return httpx.Response(403, json={"error": "this key is for infer", "code": "forbidden"})

    with ServerLink("http://server", transport=httpx.MockTransport(answer)) as link:
        texts = bad(look_at_server(link, lambda: 0.0))
    assert len(texts) == 1
    assert "this key is for infer" in texts[0]
    assert "PEFT_SERVE_API_KEY" in texts[0]
    assert "check the address" not in texts[0]


def test_a_server_whose_engine_is_dead_or_stops(url: str, world: World) -> None:
    world.engine.state = EngineState.DRAINING
    assert "/readyz: the server is draining" in run("doctor", "--url", url).all
    world.engine.state = EngineState.DEAD
    said = run("doctor", "--url", url)
    assert (said.code, "/health: the engine is dead" in said.all) == (1, True)
    world.engine.state = EngineState.RUNNING


def test_a_server_whose_base_changed_whose_clock_is_off_and_whose_requests_failed(url: str, world: World) -> None:
    world.parts.metrics.set_base_ok(ok=False)
    world.engine.fails[world.adapters["plain"]] = RuntimeError("broken")
    httpx.post(f"{url}/generate?adapter=plain", json={"inputs": "x"})
    with ServerLink(url) as link:
        texts = bad(look_at_server(link, lambda: 0.0))
    assert len(texts) == 3
    assert "clock" in texts[0]
    assert "weights are no longer those" in texts[1]
    assert "1 failed on the server's side" in texts[2]


def test_an_adapter_that_a_server_cannot_use(url: str, world: World, tmp_path: Path) -> None:
    adapter = world.adapters["plain"]
    blob = tmp_path / "server" / "store" / "blobs" / "sha256" / adapter.removeprefix("sha256:")
    (blob / "adapter_model.safetensors").write_bytes(b"spoilt")
    with pytest.raises(AdapterUnavailable, match="damaged or missing"):
        world.catalog.files(adapter)
    said = run("doctor", "--url", url)
    assert (said.code, "adapter plain" in said.all) == (1, True)


def test_another_server_at_the_address() -> None:
    def ask(*answers: httpx.Response) -> list[str]:
        turns = itertools.chain(answers, itertools.repeat(answers[-1]))
        with ServerLink("http://server", transport=httpx.MockTransport(lambda _: next(turns))) as link:
            return bad(look_at_server(link, lambda: 0.0))

    assert "it is no peft-serve" in ask(httpx.Response(404, json={}))[0]
    assert "does not answer as a peft-serve does" in ask(httpx.Response(200, json={}))[0]
    other = httpx.Response(200, json={"version": "9.9", "adapters": []})
    assert "the server is 9.9" in ask(other)[0]
