"""A server over fakes: in this process for most tests, behind a real socket where the socket matters."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from peft_serve.api.app import create_app
from tests.api.api_fakes import World, checkpoint, make_world

COMPLAINTS = {
    "template": "Tweet text : {text} Label :",
    "choices": {"complaint": "complaint", "no complaint": "no complaint"},
    "parameters": {"max_new_tokens": 4},
    "labels": ["complaint", "no complaint"],
}


def populate(world: World) -> None:
    """Three adapters: plain, with a profile, and with a soft prompt."""
    world.publish("plain", checkpoint("plain"))
    world.publish("complaints", checkpoint("complaints", profile=COMPLAINTS))
    world.publish("soft", checkpoint("soft", peft_type="PROMPT_TUNING", num_virtual_tokens=100))


@pytest.fixture
def world(tiny_tokenizer: Any, tmp_path: Path) -> Iterator[World]:
    made = make_world(tiny_tokenizer, tmp_path)
    populate(made)
    made.engine.start()
    yield made
    made.engine.stop()
    assert made.engine.num_live == 0, "every request was ended"
    assert made.num_held == 0, "every adapter was given back"
    made.catalog.check()


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(world.parts, now=lambda: 1_763_683_200.0)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as made:
        yield made


@pytest.fixture
def url(world: World) -> Iterator[str]:
    """The address of a real server in a thread."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(create_app(world.parts), log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
