"""Cache figures: what the tiers report, told to those who count, to those who learn from it and to the trace."""

from __future__ import annotations

from peft_serve.adapters.load_costs import LoadCosts
from peft_serve.adapters.lookups import Lookup
from peft_serve.engine.cache_trace import CacheTrace
from peft_serve.metrics import Metrics


class CacheFigures:
    """The one receiver of every tier's lookups. Safe from any thread."""

    def __init__(self, metrics: Metrics, costs: LoadCosts, trace: CacheTrace | None) -> None:
        self._metrics = metrics
        self._costs = costs
        self._trace = trace

    def looked_up(self, lookup: Lookup) -> None:
        """A tier was asked for an adapter."""
        self._metrics.observe_lookup(lookup.tier, hit=lookup.is_hit)
        if lookup.load_s is not None:
            self._metrics.observe_load("host", lookup.load_s)
        if lookup.num_bytes is not None:
            self._count_bytes(lookup, lookup.num_bytes)
        if self._trace is not None:
            self._trace.note(lookup)

    def evicted_from_host(self) -> None:
        """The host cache let go of an adapter to make room."""
        self._metrics.observe_evictions("host")

    def _count_bytes(self, lookup: Lookup, num_bytes: int) -> None:
        if lookup.tier == "device" and not lookup.is_hit:
            self._metrics.observe_loaded_bytes("device", num_bytes)
        elif lookup.tier == "disk" and lookup.is_hit:  # what the disk gives is what the host gets
            self._metrics.observe_loaded_bytes("host", num_bytes)
            self._costs.measure(lookup.adapter, num_bytes=num_bytes, seconds=lookup.load_s or 0.0)
