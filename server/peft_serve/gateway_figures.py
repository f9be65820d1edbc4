"""What gateways choose a server by, under vLLM's names: the endpoint pickers of the Gateway API inference extension and
of llm-d read these series as they are.

Each scrape is given one moment: the series are made of one immutable state when they are asked for, so a page that is
rendered while the next one is prepared misses none of them. Names in a label are sorted, so the same adapters are the
same series. Owns that state. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

MAX_HOST_SERIES: Final = 256  # adapters that are on the host only; those used last are told
GATEWAY_SERIES: Final = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:lora_requests_info",
    "vllm:lora_adapter_loaded",
    "vllm:num_gpu_loaded_lora_adapters",
    "vllm:max_gpu_lora_adapters",
)
"""All that endpoint pickers read, those of `Metrics` among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedAdapter:
    """A name that requests may use, and where its adapter is."""

    name: str
    is_on_device: bool  # else in host memory only
    is_pinned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayState:
    """One moment, as a gateway sees it."""

    now_s: float  # unix seconds
    loaded: Sequence[LoadedAdapter]  # on the host only: those used last come last
    waiting: Sequence[str]  # adapters that requests wait for
    num_resident: int
    max_resident: int
    block_size: int
    num_blocks: int


class GatewayFigures(Collector):
    """Safe from any thread."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._model_name = model_name
        self._state: GatewayState | None = None
        registry.register(self)

    def set_state(self, state: GatewayState) -> None:
        self._state = state

    def describe(self) -> list[GaugeMetricFamily]:
        """The families without a sample, in the order in which they are collected."""
        model = ["model_name"]
        return [
            GaugeMetricFamily(
                "vllm:cache_config_info", "Size of the KV cache.", labels=["block_size", "num_gpu_blocks"]
            ),
            GaugeMetricFamily(
                "vllm:lora_requests_info",
                "Resident and waiting adapters; the value is the time of the scrape.",
                labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
            ),
            GaugeMetricFamily(
                "vllm:lora_adapter_loaded",
                "1 for an adapter in a slot (gpu) or in host memory only (cpu).",
                labels=[*model, "adapter_name", "level", "pinned"],
            ),
            GaugeMetricFamily("vllm:num_gpu_loaded_lora_adapters", "Adapters that are in a slot.", labels=model),
            GaugeMetricFamily("vllm:max_gpu_lora_adapters", "Slots for adapters.", labels=model),
        ]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        state = self._state
        cache, requests, loaded, num_loaded, max_loaded = families = self.describe()
        if state is not None:
            cache.add_metric([str(state.block_size), str(state.num_blocks)], 1)
            requests.add_metric([str(state.max_resident), *_lists(state)], state.now_s)
            for each in _told(state.loaded):
                level, pinned = "gpu" if each.is_on_device else "cpu", str(each.is_pinned).lower()
                loaded.add_metric([self._model_name, each.name, level, pinned], 1)
            num_loaded.add_metric([self._model_name], state.num_resident)
            max_loaded.add_metric([self._model_name], state.max_resident)
        yield from families


def _lists(state: GatewayState) -> tuple[str, str]:
    """Who runs or could at once, and who waits and could not: no adapter is in both, because pickers add them up."""
    resident = {each.name for each in state.loaded if each.is_on_device}
    return ",".join(sorted(resident)), ",".join(sorted(set(state.waiting) - resident))


def _told(loaded: Sequence[LoadedAdapter]) -> list[LoadedAdapter]:
    """Each name once, where it is nearest, in the order of names."""
    on_device = {each.name: each for each in loaded if each.is_on_device}
    on_host = {each.name: each for each in loaded if not each.is_on_device and each.name not in on_device}
    latest = list(on_host.values())[-MAX_HOST_SERIES:]
    return sorted([*on_device.values(), *latest], key=lambda each: each.name)
