"""Tracing: one OpenTelemetry span for each exchange, made at its end from its record.

The span begins when the request came, continues the caller's trace where there is one (W3C's `traceparent`), and says
by its events when the request was queued, when its adapter was there, when its first step began, when the first token
came and when it was finished. Needs the extra `otel`, and is not imported without `--otlp-traces-endpoint`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from peft_serve import __version__
from peft_serve.api.access_log import fields_of
from peft_serve.api.exchanges import Exchange, Work

MAX_WORKS: Final = 25
"""Requests to the engine whose events one span tells: a span takes 128 events, and a call can be for hundreds."""
_ATTRIBUTES: Final = {
    "request_id": "peft_serve.request_id",
    "error": "error.type",
    "adapter": "peft_serve.adapter.name",
    "digest": "peft_serve.adapter.digest",
    "peft_type": "peft_serve.adapter.method",
    "outcome": "peft_serve.outcome",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "peft_serve.usage.cached_tokens",
}
"""Names of OpenTelemetry's conventions where these have one."""


class Tracing:
    """Makes the spans; see the module's docstring. `close` sends what is left."""

    def __init__(self, exporter: SpanExporter, *, model_name: str) -> None:
        """Resource attributes, the sampler and the batches follow OpenTelemetry's own environment variables."""
        resource = Resource.create({"service.name": "peft-serve", "service.version": __version__})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("peft_serve", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._model_name = model_name

    def record(self, exchange: Exchange) -> str | None:
        """Make a span of an exchange; the id of its trace, or None where the trace is not sampled."""
        parent = self._propagator.extract(dict(exchange.trace_headers))
        place = exchange.route or "unknown route"
        span = self._tracer.start_span(
            f"{exchange.method} {place}",
            context=parent,
            kind=trace.SpanKind.SERVER,
            attributes=self._attributes(exchange),
            start_time=_ns(exchange.began_s),
        )
        if span.is_recording():
            for name, at_s, attributes in _events(exchange):
                span.add_event(name, attributes, timestamp=_ns(at_s))
            if exchange.status is None or exchange.status >= 500:
                span.set_status(trace.StatusCode.ERROR, exchange.error or "")
        span.end(_ns(exchange.began_s + exchange.total_s))
        context = span.get_span_context()
        return trace.format_trace_id(context.trace_id) if context.trace_flags.sampled else None

    def close(self) -> None:
        """Send what is left. Blocks, for as long as the collector may take."""
        self._provider.shutdown()

    def _attributes(self, exchange: Exchange) -> dict[str, Any]:
        told = fields_of(exchange)
        known = {ours: told[name] for name, ours in _ATTRIBUTES.items() if told.get(name) is not None}
        known |= {"http.request.method": exchange.method}
        if exchange.route is not None:
            known["http.route"] = exchange.route
        if exchange.status is not None:
            known["http.response.status_code"] = exchange.status
        if exchange.works:
            known["gen_ai.request.model"] = self._model_name
        return known


def open_tracing(endpoint: str, *, model_name: str) -> Tracing:
    """Tracing to a collector's address for OTLP over HTTP."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return Tracing(OTLPSpanExporter(endpoint=endpoint), model_name=model_name)


def _events(exchange: Exchange) -> Iterator[tuple[str, float, dict[str, Any]]]:
    for work in exchange.works[:MAX_WORKS]:
        attributes = {"peft_serve.adapter.name": work.figures.adapter}
        for name, offset_s in _moments(work):
            yield name, exchange.began_s + work.offset_s + offset_s, attributes


def _moments(work: Work) -> Iterator[tuple[str, float]]:
    """What happened to a request, in seconds from its submission."""
    figures = work.figures
    yield "queue", 0.0
    if figures.load_s > 0:
        yield "load", figures.load_s
    if figures.ttft_s is not None:
        yield "prefill", min(figures.queue_s, figures.ttft_s)
        yield "first_token", figures.ttft_s
    yield "finish", figures.e2e_s


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
