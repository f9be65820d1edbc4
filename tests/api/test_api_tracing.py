"""Tracing: one span for each exchange, in the caller's trace."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from peft_serve.api.access_log import fields_of
from peft_serve.api.exchanges import Exchange, Work
from peft_serve.api.tracing import MAX_WORKS, Tracing
from peft_serve.metrics import RequestFigures
from tests.api.api_fakes import World
from tests.api.recorded import PARENT, SECRET, TRACE, Lines, traced


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    caplog.set_level(logging.INFO)
    return Lines(caplog)


class Spans:
    """Tracing into memory."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracing = Tracing(self._exporter, model_name="tiny-base")

    def close(self) -> list[ReadableSpan]:
        self.tracing.close()
        return list(self._exporter.get_finished_spans())


@pytest.fixture
def spans() -> Iterator[Spans]:
    made = Spans()
    yield made
    made.close()


def number(hexadecimal: str) -> int:
    return int(hexadecimal, 16)


async def test_a_request_is_one_span_in_the_callers_trace(world: World, spans: Spans, lines: Lines) -> None:
    before = time.time_ns()
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    async with traced(world, spans.tracing) as client:
        await client.get("/readyz")
        answer = await client.post("/generate?adapter=plain", json={"inputs": SECRET}, headers=headers)
    (span,) = spans.close()
    assert span.name == "POST /generate"
    assert span.kind.name == "SERVER"
    assert span.context.trace_id == number(TRACE)
    assert span.parent is not None
    assert span.parent.span_id == number(PARENT)
    assert span.context.trace_state.get("vendor") == "1"
    told = dict(span.attributes or {})
    assert told["http.response.status_code"] == 200
    assert told["peft_serve.adapter.name"] == "plain"
    assert told["peft_serve.adapter.digest"] == world.adapters["plain"]
    assert told["gen_ai.usage.input_tokens"] == int(answer.headers["x-prompt-tokens"])
    assert told["gen_ai.request.model"] == "tiny-base"
    assert told["peft_serve.request_id"] == answer.headers["x-request-id"]
    assert SECRET not in str(told)
    events = [event.name for event in span.events]
    assert events == ["queue", "prefill", "first_token", "finish"]
    times = [span.start_time, *(event.timestamp for event in span.events), span.end_time]
    assert times == sorted(t for t in times if t is not None)
    assert before <= times[0]
    assert lines.fields[0]["trace_id"] == TRACE


async def test_without_a_caller_a_trace_begins(world: World, spans: Spans, lines: Lines) -> None:
    headers = {"traceparent": "00-zzz-1-01"}
    async with traced(world, spans.tracing) as client:
        await client.post("/generate", json={"inputs": "a"}, headers=headers)
        await client.get("/adapters/plain")
    first, second = spans.close()
    assert first.parent is None
    assert first.context.trace_id != second.context.trace_id
    assert lines.fields[0]["trace_id"] == f"{first.context.trace_id:032x}"
    assert second.name == "GET /adapters/{name}"
    assert not second.events


async def test_a_trace_that_is_not_sampled_is_not_kept(world: World, spans: Spans) -> None:
    async with traced(world, spans.tracing) as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
        await client.post("/generate", json={"inputs": "a"}, headers=headers)
    assert spans.close() == []


async def test_a_failure_is_an_error_and_a_refusal_is_none(world: World, spans: Spans) -> None:
    world.engine.fails[world.adapters["plain"]] = RuntimeError("lost")
    async with traced(world, spans.tracing) as client:
        await client.post("/generate?adapter=plain", json={"inputs": "a"})
        await client.post("/generate?adapter=nobody", json={"inputs": "a"})
    failed, refused = spans.close()
    assert (failed.status.status_code.name, failed.status.description) == ("ERROR", "internal")
    assert refused.status.status_code.name == "UNSET"
    assert dict(refused.attributes or {})["error.type"] == "model_not_found"


def figures(**changes: Any) -> RequestFigures:
    known: dict[str, Any] = {
        "adapter": "a", "method": "LORA", "outcome": "ok", "finish_reason": "stop", "num_prompt_tokens": 5,
        "num_output_tokens": 2, "num_cached_tokens": 0, "queue_s": 0.5, "load_s": 0.25, "ttft_s": 0.75, "e2e_s": 1.0,
    }  # fmt: skip
    return RequestFigures(**(known | changes))


def exchange(*works: RequestFigures, status: int | None = 200) -> Exchange:
    return Exchange(
        request_id="r", method="POST", path="/generate", route="/generate", status=status, is_whole=True, error=None,
        client=None, began_s=1000.0, total_s=1.5, trace_headers={},
        works=tuple(Work(figures=each, digests=("sha256:1",), offset_s=0.25) for each in works),
    )  # fmt: skip


def test_events_stand_where_they_happened(spans: Spans) -> None:
    spans.tracing.record(exchange(figures()))
    spans.tracing.record(exchange(figures(ttft_s=None, load_s=0.0, outcome="failed")))
    with_load, failed = spans.close()
    assert (with_load.start_time, with_load.end_time) == (1_000_000_000_000, 1_001_500_000_000)
    at_s = {event.name: event.timestamp / 1e9 - 1000 for event in with_load.events}
    assert at_s == pytest.approx({"queue": 0.25, "load": 0.5, "prefill": 0.75, "first_token": 1.0, "finish": 1.25})
    assert [event.name for event in failed.events] == ["queue", "finish"]


def test_a_call_for_many_tells_of_some(spans: Spans) -> None:
    many = exchange(*(figures(adapter=f"a{i}") for i in range(100)))
    spans.tracing.record(many)
    (span,) = spans.close()
    assert len(span.events) == 5 * MAX_WORKS
    assert fields_of(many)["adapter"] == "a0,a1,a2,a3,a4,a5,a6,a7,+92 more"
    assert fields_of(many)["prompt_tokens"] == 500


def test_a_client_that_was_gone_has_no_status(spans: Spans) -> None:
    spans.tracing.record(exchange(status=None))
    (span,) = spans.close()
    assert span.status.status_code.name == "ERROR"
    assert "http.response.status_code" not in dict(span.attributes or {})


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """An address that takes what is sent there, and what was."""
    import http.server
    import threading

    taken: list[bytes] = []

    class Taker(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Taker) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1/traces", taken
        server.shutdown()
        thread.join(5)


async def test_spans_reach_a_collector(world: World) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    from peft_serve.api.tracing import open_tracing

    with collector() as (endpoint, taken):
        tracing = open_tracing(endpoint, model_name="tiny-base")
        async with traced(world, tracing) as client:
            await client.post("/generate?adapter=plain", json={"inputs": "a"})
        tracing.close()
    (message,) = [ExportTraceServiceRequest.FromString(each) for each in taken]
    (resource,) = message.resource_spans
    service = {each.key: each.value.string_value for each in resource.resource.attributes}["service.name"]
    assert service == "peft-serve"
    assert [span.name for span in resource.scope_spans[0].spans] == ["POST /generate"]


def test_the_application_knows_no_tracing_unless_it_is_given_some() -> None:
    import subprocess
    import sys

    program = "import sys, peft_serve.api.app; print([m for m in sys.modules if 'telemetry.sdk' in m])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert re.search(r"^\[\]$", found.stdout, re.MULTILINE), found.stdout
