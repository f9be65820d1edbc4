"""A whole server in this process, on a real socket: what the parity tests talk to."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import uvicorn

from peft_serve.api.app import create_app
from peft_serve.config import Settings
from peft_serve.engine.assembly import build
from peft_serve.engine.parts import ServerParts
from peft_serve.text import TextCodec


class ServedModel:
    """`with ServedModel(folder, store) as served:` then `served.client`."""

    def __init__(self, model: Path | str, store: Path, *, codec: TextCodec | None = None, **settings: Any) -> None:
        """`codec` stands in for the base's own: transformers picks the tokenizer class of some families itself."""
        self._codec = codec
        self.settings = Settings(model=str(model), store=store, dtype="float32", **settings)
        self.parts: ServerParts | None = None

    def __enter__(self) -> ServedModel:
        self.parts, self.engine = build(self.settings, say=lambda _line: None)
        if self._codec is not None:
            self.parts = replace(self.parts, codec=self._codec)
        self.engine.start()
        self._server = uvicorn.Server(
            uvicorn.Config(create_app(self.parts), host="127.0.0.1", port=0, log_level="warning", timeout_keep_alive=75)
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 60
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=120)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(timeout=60)
        assert not self._thread.is_alive(), "the server did not stop"
        self.engine.stop()
