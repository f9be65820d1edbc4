"""What tests of the records of exchanges share: the lines as they are written, and a client that is traced."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import pytest

from peft_serve.api.app import create_app
from peft_serve.api.exchanges import Tracer
from tests.api.api_fakes import World

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
SECRET = "nobody may read this"


class Lines:
    """The access log's records, as they are written."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    @property
    def fields(self) -> list[dict[str, Any]]:
        return [record.__dict__["fields"] for record in self._records]

    @property
    def levels(self) -> list[str]:
        return [record.levelname for record in self._records]

    @property
    def _records(self) -> list[logging.LogRecord]:
        return [record for record in self._caplog.records if record.name == "peft_serve.access"]


def traced(world: World, tracer: Tracer) -> httpx.AsyncClient:
    app = create_app(world.parts, tracer=tracer)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server")
