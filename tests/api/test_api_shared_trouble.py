"""A whole server whose shared store goes away and comes back, over HTTP: a folder that is moved, an object store that
is stopped, one that takes connections and says nothing, and one that takes the credentials no more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from peft_serve.adapters.catalog import Catalog
from peft_serve.config import Settings
from peft_serve.engine import adapter_places
from peft_serve.engine.adapter_places import local_folder, open_store
from tests.adapters.checkpoints import make_checkpoint
from tests.adapters.shared.object_services import ObjectService, environment, make_bucket
from tests.adapters.shared.shared_fakes import catalog_over
from tests.adapters.store.store_fakes import FakeGate
from tests.parity.bases import lively_base, save_tiny_base
from tests.parity.served import ServedModel
from tests.parity.test_parity_http import as_zip

ZIP = {"content-type": "application/zip"}
TOLD_WITHIN_S = 9.0  # one request that is given up, and what a busy machine adds
BACK_WITHIN_S = 30.0


@dataclass
class Place:
    """Where the store is. `go` takes it away, `come` brings it back."""

    store: str
    is_folder: bool
    go: Callable[[], None]
    come: Callable[[], None]

    @property
    def settings(self) -> dict[str, Any]:
        return {"store_shared": self.is_folder}

    def elsewhere(self) -> Catalog:
        """The catalog of another process."""
        settings = Settings(store=self.store, **self.settings)
        return catalog_over(open_store(settings, local_folder(settings, "demo")), FakeGate())


@pytest.fixture(params=["folder", "stopped", "silent", "expired"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    compiled = tmp_path / "compiled"  # of a bucket's adapters
    monkeypatch.setattr(adapter_places, "default_store", lambda _base_name: compiled)
    if request.param == "folder":
        root, away = tmp_path / "store", tmp_path / "away"
        yield Place(str(root), True, lambda: _moved(root / "shared", away), lambda: _moved(away, root / "shared"))
        return
    service = ObjectService()
    service.come()
    for name, value in environment(service.address).items():
        monkeypatch.setenv(name, value)
    make_bucket(service.address)
    go = {"stopped": service.go, "silent": service.fall_silent, "expired": service.expire}[request.param]
    yield Place(f"s3://bucket/{tmp_path.name}", False, go, service.come)
    service.go()


def _moved(old: Path, new: Path) -> None:
    old.rename(new)


def files_of(seed: int) -> Any:
    return make_checkpoint("lora", "llama", seed=seed, base=lively_base("llama"))[0]


def upload(seed: int) -> bytes:
    return as_zip(files_of(seed))


@dataclass
class Server:
    client: httpx.Client

    def ask(self, name: str) -> httpx.Response:
        body = {"inputs": "t09 t30 t12", "parameters": {"max_new_tokens": 4}}
        return self.client.post(f"/generate?adapter={name}", json=body)

    def put(self, name: str, seed: int) -> httpx.Response:
        return self.client.put(f"/adapters/{name}", content=upload(seed), headers=ZIP)

    def residency(self, name: str) -> str:
        return str(self.client.get(f"/adapters/{name}").json()["residency"])


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BACK_WITHIN_S
    while not is_so():
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.02)


@pytest.fixture
def server(place: Place, tmp_path: Path) -> Iterator[Server]:
    """It has `near` in memory, `compiled` on its disk, and has heard of `far`, which another process uploaded."""
    save_tiny_base("llama", tmp_path / "base")
    settings = {**place.settings, "store_poll_s": 0.05}
    with ServedModel(tmp_path / "base", place.store, **settings) as served:  # type: ignore[arg-type]
        made = Server(served.client)
        for seed, name in enumerate(("near", "compiled")):
            assert made.put(name, seed).status_code == 201
            assert made.ask(name).status_code == 200
        made.client.post("/adapters/compiled/unload")
        until(lambda: made.residency("compiled") == "disk")
        place.elsewhere().changes.publish("far", files_of(7))
        until(lambda: "far" in made.client.get("/adapters").text)
        yield made


def test_residents_go_on_changes_are_refused_and_everything_comes_back(server: Server, place: Place) -> None:
    said = server.ask("near").json()["generated_text"]
    place.go()
    refused: list[Callable[[], httpx.Response]] = [
        lambda: server.ask("far"),
        lambda: server.put("new", 3),
        lambda: server.put("near", 3),
        lambda: server.client.delete("/adapters/near"),
        lambda: server.client.delete("/adapters/far"),
        lambda: server.client.post("/adapters/near/pin"),
        lambda: server.client.get("/adapters/near/archive"),
        lambda: server.client.put("/aliases/best", json={"targets": [{"adapter": "near"}]}),
        lambda: server.client.post("/adapters/near/rollback", json={"version": 1}),
    ]
    began_s = time.monotonic()
    with ThreadPoolExecutor(8) as pool:  # one behind another's lock
        deletes = list(pool.map(lambda _: server.client.delete("/adapters/near"), range(8)))
    took_s = [time.monotonic() - began_s]
    for answer in deletes:
        assert (answer.status_code, "retry-after" in answer.headers) == (503, True), answer.text
    for call in refused:
        began_s = time.monotonic()
        answer = call()
        took_s.append(time.monotonic() - began_s)
        assert (answer.status_code, "retry-after" in answer.headers) == (503, True), answer.text
        assert "adapter store" in answer.json()["detail"]
        for path in ("/readyz", "/livez", "/health"):
            assert server.client.get(path).status_code == 200
        near = server.ask("near")
        assert (near.status_code, near.json()["generated_text"]) == (200, said)
    assert server.ask("compiled").status_code == 200, "what is compiled on this machine needs no store"
    listed = server.client.get("/adapters").json()["adapters"]
    assert {entry["name"] for entry in listed} >= {"near", "compiled", "far"}
    assert max(took_s) < TOLD_WITHIN_S, took_s

    place.come()
    until(lambda: server.put("new", 3).status_code in (200, 201))
    for name in ("near", "compiled", "far", "new"):
        assert server.ask(name).status_code == 200, name
    assert server.client.delete("/adapters/new").status_code == 204
    elsewhere = place.elsewhere()
    elsewhere.changes.publish("near", files_of(8))
    elsewhere.changes.delete("compiled")
    until(lambda: server.ask("near").json()["adapter"]["version"] == 2)
    until(lambda: server.ask("compiled").status_code == 404)
