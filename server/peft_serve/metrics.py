"""What a server counts, in Prometheus' words.

vLLM's names where vLLM has the figure, so that dashboards and gateways made for it work as they are; ours,
`peft_serve_`, beside them. Owns one registry. Knows no engine: whoever sees something tells it here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from peft_serve.adapters.lookups import CACHE_HITS, CACHE_MISSES
from peft_serve.alias_figures import AliasFigures
from peft_serve.decode_figures import DecodeFigures
from peft_serve.gateway_figures import GATEWAY_SERIES, GatewayFigures, GatewayState, LoadedAdapter
from peft_serve.tenant_figures import TenantFigures

Tier = Literal["device", "host", "disk"]

MAX_ADAPTER_LABELS: Final = 100  # more names than this share the label `_other`
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
COMPILED_OUTCOMES: Final = ("hit", "miss", "written", "passed_over", "evicted", "damaged", "failed")
UPLOAD_OUTCOMES: Final = ("created", "unchanged", "refused", "failed")
ENGINE_STATES: Final = ("starting", "running", "draining", "stopped", "dead")

_LATENCY_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKENS: Final = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFigures:
    """One request that has ended. Times in seconds; None where it never got that far."""

    adapter: str  # its name; `base` for the base
    method: str  # peft_type; `base` for the base
    outcome: str  # ok | cancelled | refused | failed
    finish_reason: str
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int  # of the prompt, found in the prefix cache
    queue_s: float
    load_s: float = 0.0  # of these, until its adapter was on the host; 0: it was there
    ttft_s: float | None
    e2e_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFigures:
    """The moment's state, set just before a scrape."""

    now_s: float  # unix seconds
    num_running: int
    num_waiting: int
    resident_adapters: tuple[str, ...]  # of each slot that is taken
    waiting_adapters: tuple[str, ...]
    host_adapters: tuple[str, ...]
    loaded: tuple[LoadedAdapter, ...]  # under every name they are asked for by
    device_bytes: int
    host_bytes: int
    kv_usage: float
    step_time: Mapping[str, float]  # fitted seconds of a step, and of each token, rank and KV position in it
    max_resident: int
    num_blocks: int
    block_size: int
    engine_state: str  # one of ENGINE_STATES
    stalled_s: float  # how long the step in progress has been running


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildFacts:
    """What runs here; the same from start to end."""

    version: str
    python: str
    torch: str
    transformers: str
    base: str  # its class
    dtype: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Counts since the start, for whoever makes rates of them."""

    num_requests: float  # that have ended, however they did
    num_steps: float
    step_s: float  # that these took together
    prompt_tokens: float  # looked up in the prefix cache
    cached_tokens: float  # and found


class Metrics:
    """The registry and the few acts that change it. Safe from any thread."""

    def __init__(
        self, registry: CollectorRegistry | None = None, *, model_name: str = "", build: BuildFacts | None = None
    ) -> None:
        """`model_name` is the base's as served: the label by which dashboards made for vLLM pick a server."""
        self._registry = registry or CollectorRegistry()
        self._model_name = model_name
        self._labels: set[str] = set()
        self._make_request_metrics()
        self._make_engine_metrics()
        self._make_adapter_metrics()
        self._make_server_metrics(build)
        self.tenants = TenantFigures(self._registry)
        self.aliases = AliasFigures(self._registry)
        self.decode = DecodeFigures(self._registry)

    def _make_request_metrics(self) -> None:
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.")
        self._inter_token = self._histogram("vllm:inter_token_latency_seconds", "From token to token.")
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.")
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Arrival to first step.")
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "First step to first token.")
        self._decode = self._histogram("vllm:request_decode_time_seconds", "First token to last token.")
        self._request_prompt = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._request_output = self._histogram("vllm:request_generation_tokens", "Tokens it was given.", _TOKENS)
        self._prompt_tokens = self._counter(
            "vllm:prompt_tokens", "Prompt tokens, found in the prefix cache or computed."
        )
        self._output_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._prefix_queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up.")
        self._prefix_hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens found computed.")
        self._success = Counter(
            "vllm:request_success",
            "Requests that ended.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )

    def _make_engine_metrics(self) -> None:
        r = self._registry
        self._running = self._gauge("vllm:num_requests_running", "Requests that are in the batch.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait.")
        self._kv_usage = self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.")
        self._step_tokens = self._histogram("vllm:iteration_tokens_total", "Tokens computed in a step.", _TOKENS)
        self._gateway = GatewayFigures(r, self._model_name)
        self._step_s = Histogram(
            "peft_serve_step_seconds", "Plan, run and commit of a step.", buckets=_LATENCY_S, registry=r
        )
        self._step_time = Gauge(
            "peft_serve_step_time_model_seconds",
            "What a step takes, as fitted: of itself, and for each token, adapter rank and KV position.",
            ["per"],
            registry=r,
        )
        self._step_rows = Histogram("peft_serve_step_rows", "Rows in a step.", buckets=_ROWS, registry=r)
        self._step_adapters = Histogram(
            "peft_serve_step_distinct_adapters",
            "Distinct adapters in a step.",
            buckets=(0, *_ROWS),
            registry=r,
        )
        self._padding = Gauge(
            "peft_serve_step_padding_ratio", "Padded share of the last step's tokens (ragged: 0).", registry=r
        )
        self._padding.set(0.0)
        self._engine_state = Gauge("peft_serve_engine_state", "1 for the engine's state.", ["state"], registry=r)
        self._stalled = Gauge("peft_serve_engine_stalled_seconds", "How long the step in progress runs.", registry=r)

    def _make_server_metrics(self, build: BuildFacts | None) -> None:
        r = self._registry
        ProcessCollector(registry=r)  # memory, CPU time, files and start of this process; on Linux
        self._loop_lag = Histogram(
            "peft_serve_event_loop_lag_seconds", "How late the event loop is.", buckets=_LATENCY_S, registry=r
        )
        self._fingerprint = Gauge("peft_serve_base_fingerprint_ok", "1 while the base is unchanged.", registry=r)
        self._fingerprint.set(1)
        names = [each.name for each in fields(BuildFacts)]
        built = Gauge("peft_serve_build_info", "Always 1; the labels say what runs here.", names, registry=r)
        if build is not None:
            built.labels(**asdict(build)).set(1)

    def _gauge(self, name: str, documentation: str) -> Gauge:
        return Gauge(name, documentation, ["model_name"], registry=self._registry).labels(self._model_name)

    def _counter(self, name: str, documentation: str) -> Counter:
        return Counter(name, documentation, ["model_name"], registry=self._registry).labels(self._model_name)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float] = _LATENCY_S) -> Histogram:
        made = Histogram(name, documentation, ["model_name"], buckets=buckets, registry=self._registry)
        return made.labels(self._model_name)

    def _make_adapter_metrics(self) -> None:
        r = self._registry
        self._adapter_requests = Counter(
            "peft_serve_adapter_requests", "Requests by adapter.", ["adapter", "method", "outcome"], registry=r
        )
        self._adapter_tokens = Counter(
            "peft_serve_adapter_tokens", "Tokens by adapter.", ["adapter", "kind"], registry=r
        )
        self._adapter_resident = Gauge(
            "peft_serve_adapter_resident", "1 for an adapter in this tier.", ["adapter", "tier"], registry=r
        )
        self._adapter_bytes = Gauge("peft_serve_adapter_bytes", "Bytes of adapters.", ["tier"], registry=r)
        self._hits = Counter("peft_serve_adapter_cache_hits", CACHE_HITS, ["tier"], registry=r)
        self._misses = Counter("peft_serve_adapter_cache_misses", CACHE_MISSES, ["tier"], registry=r)
        self._loaded_bytes = Counter(
            "peft_serve_adapter_cache_loaded_bytes", "Bytes of adapters brought into the tier.", ["tier"], registry=r
        )
        self._evictions = Counter("peft_serve_adapter_evictions", "Taken out to make room.", ["tier"], registry=r)
        self._load_s = Histogram(
            "peft_serve_adapter_load_seconds", "Load into the tier.", ["tier"], buckets=_LATENCY_S, registry=r
        )
        self._compiled = Counter(
            "peft_serve_compiled_cache", "What the cache of compiled adapters on disk did.", ["outcome"], registry=r
        )
        self._uploads = Counter("peft_serve_adapter_uploads", "Uploads by outcome.", ["outcome"], registry=r)
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """A series that appears with its first event has no rate at the moment when that matters."""
        for tier in ("device", "host", "disk"):
            self._hits.labels(tier)
            self._misses.labels(tier)
        for tier in ("device", "host"):
            self._loaded_bytes.labels(tier)
            self._evictions.labels(tier)
        for outcome in COMPILED_OUTCOMES:
            self._compiled.labels(outcome)
        for outcome in UPLOAD_OUTCOMES:
            self._uploads.labels(outcome)

    def observe_request(self, figures: RequestFigures) -> None:
        """A request has ended."""
        label = self._label(figures.adapter)
        self._adapter_requests.labels(label, figures.method, figures.outcome).inc()
        self._adapter_tokens.labels(label, "prompt").inc(figures.num_prompt_tokens)
        self._adapter_tokens.labels(label, "output").inc(figures.num_output_tokens)
        self._prompt_tokens.inc(figures.num_prompt_tokens)
        self._prefix_queries.inc(figures.num_prompt_tokens)
        self._prefix_hits.inc(figures.num_cached_tokens)
        self._output_tokens.inc(figures.num_output_tokens)
        self._queue.observe(figures.queue_s)
        self._e2e.observe(figures.e2e_s)
        if figures.ttft_s is not None:
            self._ttft.observe(figures.ttft_s)
        if figures.outcome == "ok":
            self._observe_success(figures)

    def _observe_success(self, figures: RequestFigures) -> None:
        self._success.labels(self._model_name, figures.finish_reason).inc()
        self._request_prompt.observe(figures.num_prompt_tokens)
        self._request_output.observe(figures.num_output_tokens)
        if figures.ttft_s is not None:
            self._prefill.observe(max(0.0, figures.ttft_s - figures.queue_s))
            self._decode.observe(figures.e2e_s - figures.ttft_s)

    def observe_inter_token(self, seconds: float) -> None:
        self._inter_token.observe(seconds)

    def observe_loop_lag(self, seconds: float) -> None:
        self._loop_lag.observe(seconds)

    def observe_step(self, *, seconds: float, num_rows: int, num_tokens: int, num_adapters: int) -> None:
        """A step has been planned, run and committed; `num_adapters` counts adapters, not the base."""
        self._step_s.observe(seconds)
        self._step_rows.observe(num_rows)
        self._step_tokens.observe(num_tokens)
        self._step_adapters.observe(num_adapters)

    def observe_lookup(self, tier: Tier, *, hit: bool) -> None:
        (self._hits if hit else self._misses).labels(tier).inc()

    def observe_loaded_bytes(self, tier: Tier, num_bytes: int) -> None:
        self._loaded_bytes.labels(tier).inc(num_bytes)

    def observe_evictions(self, tier: Tier, count: int = 1) -> None:
        self._evictions.labels(tier).inc(count)

    def observe_load(self, tier: Tier, seconds: float) -> None:
        self._load_s.labels(tier).observe(seconds)

    def observe_compiled(self, outcome: str) -> None:
        """One of `COMPILED_OUTCOMES`."""
        self._compiled.labels(outcome).inc()

    def observe_upload(self, outcome: str) -> None:
        """One of `UPLOAD_OUTCOMES`."""
        self._uploads.labels(outcome).inc()

    def set_base_ok(self, *, ok: bool) -> None:
        self._fingerprint.set(1 if ok else 0)

    def set_state(self, state: StateFigures) -> None:
        """Bring every gauge up to the moment."""
        self._running.set(state.num_running)
        self._waiting.set(state.num_waiting)
        self._kv_usage.set(state.kv_usage)
        for part, seconds in state.step_time.items():
            self._step_time.labels(part).set(seconds)
        self._adapter_bytes.labels("device").set(state.device_bytes)
        self._adapter_bytes.labels("host").set(state.host_bytes)
        self._stalled.set(state.stalled_s)
        for name in ENGINE_STATES:
            self._engine_state.labels(name).set(name == state.engine_state)
        self._gateway.set_state(
            GatewayState(
                now_s=state.now_s,
                loaded=state.loaded,
                waiting=state.waiting_adapters,
                num_resident=len(state.resident_adapters),
                max_resident=state.max_resident,
                block_size=state.block_size,
                num_blocks=state.num_blocks,
            )
        )
        self._adapter_resident.clear()
        for tier, names in (("device", state.resident_adapters), ("host", state.host_adapters)):
            for name in names:
                self._adapter_resident.labels(self._label(name), tier).set(1)

    def totals(self) -> Totals:
        """How things stand now. Walks the series of four metrics: a few times a second, not once a request."""
        return Totals(
            num_requests=_sum_of(self._adapter_requests, "_total"),
            num_steps=_sum_of(self._step_s, "_count"),
            step_s=_sum_of(self._step_s, "_sum"),
            prompt_tokens=_sum_of(self._prefix_queries, "_total"),
            cached_tokens=_sum_of(self._prefix_hits, "_total"),
        )

    def render(self) -> bytes:
        """The page a scraper reads, as `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def render_for_gateways(self) -> bytes:
        """Of it what endpoint pickers read: so little that they may ask twenty times a second."""
        return generate_latest(self._registry.restricted_registry(GATEWAY_SERIES))

    def _label(self, adapter: str) -> str:
        if adapter in self._labels:
            return adapter
        if len(self._labels) >= MAX_ADAPTER_LABELS:
            return "_other"
        self._labels.add(adapter)
        return adapter


def _sum_of(metric: Counter | Histogram, suffix: str) -> float:
    """Over every label, the samples whose name ends so."""
    return sum(s.value for family in metric.collect() for s in family.samples if s.name.endswith(suffix))
