"""One real server over a tiny base, asked until everything it counts has moved."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.checkpoints import make_checkpoint
from tests.deploy.pages import Page
from tests.parity.bases import save_tiny_base, words
from tests.parity.served import ServedModel
from tests.parity.test_parity_http import as_zip

LONG = {"max_new_tokens": 100, "ignore_eos": True}
ZIP = {"content-type": "application/zip"}


@dataclass(frozen=True)
class Load:
    """The metrics of a server before it was asked anything, while it was busy, afterwards, and while it drained."""

    before: Page
    busy: Page
    after: Page
    draining: Page
    draining_status: dict[str, int]  # of the routes that are asked about it meanwhile
    drained_status: int  # of the answer that ran
    routes: frozenset[str]


def page(served: ServedModel) -> Page:
    return Page.read(served.client.get("/metrics").text)


def ask(served: ServedModel, adapter: str, **parameters: Any) -> int:
    body = {"inputs": words([5, 6, 7, 8, 9, 10, 11, 12, 13]), "parameters": {"max_new_tokens": 4} | parameters}
    return served.client.post("/generate", params={"adapter": adapter}, json=body).status_code


def busy(served: ServedModel) -> Page:
    """A look while one request runs and others wait."""
    asked = [threading.Thread(target=ask, args=(served, name), kwargs=LONG) for name in ("a", "b", "base", "a")]
    for thread in asked:
        thread.start()
    deadline = time.monotonic() + 20
    while True:
        seen = page(served)
        if seen.total("vllm:num_requests_waiting") and seen.total("vllm:kv_cache_usage_perc"):
            break
        assert time.monotonic() < deadline, "requests wait"
    for thread in asked:
        thread.join()
    return seen


def draining(served: ServedModel) -> tuple[Page, dict[str, int], int]:
    """A look while one request runs and no other is let in, as after SIGTERM."""
    running: Future[int] = Future()
    asked = threading.Thread(target=lambda: running.set_result(ask(served, "a", **LONG)))
    asked.start()
    deadline = time.monotonic() + 20
    while not served.engine.snapshot().num_running:
        assert time.monotonic() < deadline, "it runs"
        time.sleep(0.001)
    served.engine.close_admission()
    seen = page(served)
    statuses = {path: served.client.get(path).status_code for path in ("/readyz", "/health", "/livez", "/metrics")}
    asked.join()
    return seen, statuses, running.result()


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    root = tmp_path_factory.mktemp("load")
    save_tiny_base("llama", root / "base")
    limits = {"max_rows": 1, "max_resident_adapters": 1, "host_adapter_bytes": 10_000, "block_size": 4}
    with ServedModel(root / "base", Path(root / "store"), **limits) as served:
        before = page(served)
        for name, method in (("a", "lora"), ("b", "lora_dora")):
            content = as_zip(make_checkpoint(method, "llama")[0])
            assert served.client.put(f"/adapters/{name}", content=content, headers=ZIP).status_code == 201
            assert served.client.put(f"/adapters/{name}", content=content, headers=ZIP).status_code == 200
        assert served.client.put("/adapters/c", content=b"no archive", headers=ZIP).status_code == 400
        for name in ("a", "b", "a", "a", "base", "base"):
            assert ask(served, name) == 200
        seen = busy(served)
        routes = frozenset(served.client.get("/openapi.json").json()["paths"])
        after = page(served)
        drained, statuses, status = draining(served)
        return Load(
            before=before,
            busy=seen,
            after=after,
            draining=drained,
            draining_status=statuses,
            drained_status=status,
            routes=routes,
        )
