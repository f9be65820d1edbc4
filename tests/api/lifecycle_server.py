"""A server whose model is made of dictionaries, and callers who come and go: everything between the two is real.

Routes, catalog, store, host cache, engine, scheduler and ledgers are the server's own. The gate takes everything, no
upload is tried out, and steps are run when they are let: so a request stays in flight for as long as a test wants.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from peft_serve.adapters.catalog import Catalog
from peft_serve.adapters.changes import Published
from peft_serve.adapters.findings import Prove
from peft_serve.adapters.folders import CheckpointFolders
from peft_serve.adapters.host_cache import HostCache
from peft_serve.adapters.primitives import Adapter, Affine
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.store import AdapterStore
from peft_serve.api.app import create_app
from peft_serve.core import BASE, AdapterId, Footprint, Request, RequestId, Step, StepResult
from peft_serve.engine.loop import Engine
from peft_serve.scheduling.blocks import BlockLedger
from peft_serve.scheduling.limits import Limits
from peft_serve.scheduling.scheduler import Scheduler
from peft_serve.scheduling.slots import SlotLedger
from tests.adapters.store.store_fakes import NOON, UnsyncedFileSystem
from tests.api.api_fakes import BASE_NAME, fake_gate, make_world
from tests.scheduling.fake_model import FakeModel, alone

NUM_SLOTS: Final = 3
NUM_BLOCKS: Final = 400
LIMITS: Final = Limits(
    max_rows=6, max_step_tokens=16, max_step_adapters=2, max_step_rank=24, max_queue=64, block_size=4, max_context=512
)
FOOTPRINT: Final = Footprint(num_bytes=10, max_rank=8)
_PATIENCE_S: Final = 20.0


class UntriedCatalog(Catalog):
    """A catalog whose uploads are not tried out: the trial is a request, and steps wait to be let."""

    def __init__(self, *parts: Any, **facts: Any) -> None:
        super().__init__(*parts, **facts)
        publish = self.changes.publish

        def untried(name: str, files: CheckpointFiles, *, prove: Prove | None = None, **more: Any) -> Published:
            return publish(name, files, **more)

        self.changes.publish = untried  # type: ignore[method-assign]


class Gate:
    """Steps pass while it is open, or as many as it was opened for."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._left: float = float("inf")
        self.is_waited_at = False

    def open(self, count: float = float("inf")) -> None:
        with self._news:
            self._left = count
            self._news.notify_all()

    @property
    def left(self) -> float:
        return self._left

    def take(self) -> None:
        with self._news:
            self.is_waited_at = self._left <= 0
            assert self._news.wait_for(lambda: self._left > 0, _PATIENCE_S), "nobody opens the gate"
            self._left -= 1
            self.is_waited_at = False


class _Runner:
    def __init__(self, model: FakeModel, gate: Gate, copies: Callable[[AdapterId], Adapter]) -> None:
        self._model = model
        self._gate = gate
        self._copies = copies

    def run(self, step: Step) -> StepResult:
        self._gate.take()
        for install in step.installs:
            assert self._copies(install.adapter).id == install.adapter
        return self._model.run(step)


class Call:
    """One HTTP call in this process. `leave` goes away in the middle of it, whatever it is doing."""

    def __init__(self, app: Any, method: str, path: str, body: Any = None, **headers: str) -> None:
        self._body = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        address, _, query = path.partition("?")
        sent = {"host": "server", "content-length": str(len(self._body)), **headers}
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": address,
            "raw_path": address.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
            "client": ("10.0.0.1", 5),
            "server": ("server", 80),
            "scheme": "http",
        }
        self._is_read = False
        self._gone = asyncio.Event()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.content = b""
        self.task = asyncio.ensure_future(app(self._scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if not self._is_read:
            self._is_read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Mapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.content += message.get("body", b"")

    async def ended(self) -> Call:
        await asyncio.wait_for(asyncio.shield(self.task), _PATIENCE_S)
        return self

    async def leave(self) -> None:
        self._gone.set()
        await self.ended()

    @property
    def json(self) -> Any:
        return json.loads(self.content)


class Server:
    """See the module's docstring."""

    def __init__(self, tokenizer: Any, root: Path) -> None:
        self.gate = Gate()
        self.store = AdapterStore(root / "kept", UnsyncedFileSystem())
        fs = UnsyncedFileSystem()
        folders = CheckpointFolders([], fs, base_name=BASE_NAME)
        self.catalog = UntriedCatalog(
            self.store, folders, fake_gate, checked_for="test", base_name=BASE_NAME, now=lambda: NOON
        )
        self.slots = SlotLedger(num_slots=NUM_SLOTS, max_bytes=1000)
        self.blocks = BlockLedger(num_blocks=NUM_BLOCKS, block_size=4)
        self.scheduler = Scheduler(LIMITS, self.slots, self.blocks, None, time.monotonic)
        footprints: dict[AdapterId, Footprint] = defaultdict(lambda: FOOTPRINT, {BASE: Footprint(num_bytes=0)})
        model = FakeModel(num_slots=NUM_SLOTS, block_size=4, footprints=footprints)
        made = make_world(tokenizer, root)
        self.engine = Engine(
            scheduler=self.scheduler,
            make_runner=lambda copies: _Runner(model, self.gate, copies),
            host_cache=HostCache(self._loaded, max_bytes=30, clock=time.monotonic),
            metrics=made.parts.metrics,
            clock=time.monotonic,
            draw_seed=lambda: 0,  # what a request without a seed has alone
            footprint_of=lambda _adapter: FOOTPRINT,
            block_size=4,
            max_queue=64,
        )
        self.submitted: dict[RequestId, Request] = {}
        submit = self.engine.submit

        def noted(request: Request) -> None:
            self.submitted[request.id] = request
            submit(request)

        self.engine.submit = noted  # type: ignore[method-assign]  # what goes in, for the oracle
        self.app = create_app(replace(made.parts, catalog=self.catalog, engine=self.engine), now=lambda: 0.0)
        self.engine.start()

    def _loaded(self, adapter: AdapterId) -> Adapter:
        assert self.catalog.files(adapter).digest() == adapter
        return Adapter(id=adapter, method="LORA", sites={"some.site": Affine(shift=torch.zeros(1))})

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Call:
        return Call(self.app, method, path, body, **headers)

    def tokens_alone(self, request: Request) -> list[int]:
        answer = alone(request, FOOTPRINT, LIMITS, capacity=self.blocks.capacity, cross_capacity=0)
        return list(answer.tokens)

    async def rest(self) -> None:
        """Wait until what was let through the gate has been done, and told."""
        until = time.monotonic() + _PATIENCE_S
        while not self.gate.is_waited_at and self.scheduler.has_work:
            assert time.monotonic() < until, "the engine does not come to rest"
            await asyncio.sleep(0.0003)
        for _ in range(3):
            await asyncio.sleep(0.0005)

    async def settle(self) -> None:
        """Let everything run until the engine has nothing left to do."""
        self.gate.open()
        until = time.monotonic() + _PATIENCE_S
        while self.engine.snapshot().num_running or self.engine.snapshot().num_waiting or self.scheduler.has_work:
            assert time.monotonic() < until, "the engine does not come to rest"
            await asyncio.sleep(0.0005)

    def close(self) -> None:
        self.gate.open()
        self.engine.stop()
        self.store.close()
        self.scheduler.check()
        assert self.slots.num_leases == 0
