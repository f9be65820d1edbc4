"""A fake server that speaks the routes the load client uses, and small bases and adapters made once."""

from __future__ import annotations

import asyncio
import json
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from loadtest.adapters import make_adapters, mixture
from loadtest.bases import ensure_base


@dataclass
class FakeServer:
    """Answers every request with numbered tokens; adapters whose name starts with ``bad`` misbehave."""

    token_delay_s: float = 0.0
    url: str = ""
    running: int = 0
    most_running: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    acts: list[str] = field(default_factory=list)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/generate_stream", self.generate_stream)
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_put("/adapters/{name}", self.upload)
        app.router.add_delete("/adapters/{name}", self.act)
        app.router.add_post("/adapters/{name}/unload", self.act)
        app.router.add_post("/generate", self.act)
        app.router.add_get("/metrics", self.metrics)
        return app

    async def generate_stream(self, request: web.Request) -> web.StreamResponse:
        body, adapter = await request.json(), request.query.get("adapter", "")
        self.bodies.append({"adapter": adapter, **body})
        if adapter == "bad-unknown":
            return web.json_response({"error": "no such adapter"}, status=404)
        count = body["parameters"]["max_new_tokens"]
        response = await self._begin(request, len(body["inputs"].split()))
        await response.write(b": keep-alive\n\n")
        for number in range(count):
            await asyncio.sleep(self.token_delay_s)
            event: dict[str, Any] = {"token": {"id": number, "text": f" {number}"}, "generated_text": None}
            if number == count - 1:
                event["generated_text"] = f"{adapter}: {count} tokens"
            if adapter == "bad-middle" and number == 1:
                await response.write(b'data:{"error":"gone","error_type":"generation"}\n\n')
                break
            await response.write(b"data:" + json.dumps(event).encode() + b"\n\n")
        self.running -= 1
        return response

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        response = await self._begin(request, len(body["prompt"]))
        for number in range(body["max_tokens"]):
            chunk = json.dumps({"choices": [{"text": f" {number}", "finish_reason": None}]}).encode()
            await response.write(b"data: " + chunk + b"\r\n\r\n")
        closing = json.dumps({"choices": [{"text": "", "finish_reason": "length"}]}).encode()
        await response.write(b"data: " + closing + b"\r\n\r\ndata: [DONE]\r\n\r\n")
        self.running -= 1
        return response

    async def _begin(self, request: web.Request, prompt_tokens: int) -> web.StreamResponse:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        response = web.StreamResponse(headers={"x-prompt-tokens": str(prompt_tokens)})
        await response.prepare(request)
        return response

    async def upload(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/zip"
        name = request.match_info["name"]
        status = 200 if name in self.uploads else 201
        self.uploads[name] = await request.read()
        return web.json_response({"name": name}, status=422 if name.startswith("bad") else status)

    async def act(self, request: web.Request) -> web.Response:
        self.acts.append(f"{request.method} {request.path}")
        return web.json_response({}, status=404 if "missing" in request.path else 200)

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=f"# a comment\nvllm:num_requests_running 0\nfake:requests_total {len(self.bodies)}\n")


@contextmanager
def listening(app: web.Application) -> Iterator[str]:
    """The app's address while it listens on a thread of its own."""
    loop, ready, addresses = asyncio.new_event_loop(), threading.Event(), list[str]()
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        addresses.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        ready.set()

    def serve() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    ready.wait(10)
    yield addresses[0]
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@pytest.fixture
def serve() -> Iterator[Callable[[web.Application], str]]:
    """Puts an app of one's own on the network for the test, and answers with its address."""
    with ExitStack() as running:
        yield lambda app: running.enter_context(listening(app))


@pytest.fixture
def fake_server(serve: Callable[[web.Application], str]) -> FakeServer:
    """The fake, listening, on a thread of its own."""
    fake = FakeServer()
    fake.url = serve(fake.app())
    return fake


@pytest.fixture(scope="session")
def tiny_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with the tiny base in it."""
    work = tmp_path_factory.mktemp("work")
    ensure_base("tiny", work)
    return work


@pytest.fixture(scope="session")
def tiny_base(tiny_work: Path) -> Path:
    """The tiny base's folder."""
    return ensure_base("tiny", tiny_work)


@pytest.fixture(scope="session")
def mixed_adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One adapter of each kind of MIX: LoRA, LoRA, IA3, prompt, prefix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft uses names that transformers is about to drop
        return list(make_adapters(tiny_base, tmp_path_factory.mktemp("mix"), mixture("MIX"), 5))
