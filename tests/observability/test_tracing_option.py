"""`--otlp-traces-endpoint`: what is wrong with it is said before a base is loaded."""

from __future__ import annotations

import sys

import pytest

from peft_serve.api.tracing import Tracing
from peft_serve.commands.serving import _open_tracer
from peft_serve.config import Settings

ENDPOINT = "http://127.0.0.1:9/v1/traces"


def test_no_address_no_tracing() -> None:
    assert _open_tracer(Settings()) is None


def test_an_address_of_grpc_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"collector:4317.*OTLP over HTTP"):
        _open_tracer(Settings(otlp_traces_endpoint="collector:4317"))


def test_without_the_extra_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft_serve.api.tracing", None)
    with pytest.raises(ValueError, match=r"pip install 'peft-serve\[otel\]'"):
        _open_tracer(Settings(otlp_traces_endpoint=ENDPOINT))


def test_an_address_opens_tracing() -> None:
    tracer = _open_tracer(Settings(otlp_traces_endpoint=ENDPOINT))
    assert isinstance(tracer, Tracing)
    tracer.close()
