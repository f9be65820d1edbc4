"""A port of what an endpoint picker makes of a page of /metrics.

The rules are those of the core metrics extractor of llm-d's router, which the Gateway API inference extension's picker
shares, with its built-in engine `vllm` (read in November 2026):

- an ordinary series: of the samples that carry the spec's labels the newest by timestamp, the first of equals;
- a family that is missing, or empty, is an error, and what was known stays; but those of LoRA may be missing;
- `vllm:lora_requests_info`: the sample with the largest value, whose labels are lists with commas;
- `vllm:lora_adapter_loaded`: the union of the series that are not 0; `gpu` outranks `cpu`;
- the two counts beside it: the largest of their series; their presence alone says that residency is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

Families = Mapping[str, Sequence[Sample]]

ENGINE_VLLM = {
    "queued": "vllm:num_requests_waiting",
    "running": "vllm:num_requests_running",
    "kv_usage": "vllm:kv_cache_usage_perc",
    "lora": "vllm:lora_requests_info",
    "loaded": "vllm:lora_adapter_loaded",
    "gpu_loaded": "vllm:num_gpu_loaded_lora_adapters",
    "gpu_slots": "vllm:max_gpu_lora_adapters",
    "cache": "vllm:cache_config_info",
}


@dataclass
class Endpoint:
    """What the picker schedules by."""

    waiting: int = 0
    running: int = 0
    kv_usage: float = 0.0
    active_models: set[str] = field(default_factory=set)
    waiting_models: set[str] = field(default_factory=set)
    max_active_models: int = 0
    loaded: dict[str, tuple[str, bool]] | None = None  # name to (level, pinned); None: the server does not tell
    num_gpu_loaded: int = 0
    base_model: str = ""
    block_size: int = 0
    num_blocks: int = 0
    errors: list[str] = field(default_factory=list)  # of the last page

    def read(self, page: str) -> Endpoint:
        """The same endpoint after a scrape."""
        self.errors = []
        families = {
            name: [sample for sample in family.samples if sample.name == name]
            for family in text_string_to_metric_families(page)
            if (name := family.name) in ENGINE_VLLM.values() and family.type == "gauge"
        }
        self._read_load(families)
        self._read_requests(families)
        self._read_residency(families)
        config = self._newest(families, "cache")
        if config is not None:
            self.block_size = int(config.labels.get("block_size", "0") or 0)
            self.num_blocks = int(config.labels.get("num_gpu_blocks", str(self.num_blocks)))
        return self

    def affinity(self, model: str) -> float:
        """The score of the `lora-affinity-scorer`."""
        if model in self.active_models:
            return 1.0
        if len(self.active_models) + len(self.waiting_models) < self.max_active_models:
            return 0.8
        return 0.6 if model in self.waiting_models else 0.0

    def load_state(self, model: str) -> str:
        """The tier of the `lora-load-state-scorer`, without its bonuses."""
        level, _ = (self.loaded or {}).get(model, ("", False))
        if level:
            return level
        if self.num_gpu_loaded < self.max_active_models:
            return "free"
        idle = (
            name
            for name, (level, pinned) in (self.loaded or {}).items()
            if level == "gpu" and not pinned and name not in self.active_models
        )
        return "evictable" if any(idle) else "saturated"

    def _read_load(self, families: Families) -> None:
        queued, running, usage = (self._newest(families, key) for key in ("queued", "running", "kv_usage"))
        self.waiting = self.waiting if queued is None else int(queued.value)
        self.running = self.running if running is None else int(running.value)
        self.kv_usage = self.kv_usage if usage is None else usage.value

    def _read_requests(self, families: Families) -> None:
        latest = max(families.get(ENGINE_VLLM["lora"], ()), key=lambda sample: sample.value, default=None)
        if latest is None or latest.value < 0:
            return
        self.active_models = _split(latest.labels.get("running_lora_adapters", ""))
        self.waiting_models = _split(latest.labels.get("waiting_lora_adapters", ""))
        if most := latest.labels.get("max_lora"):
            try:
                self.max_active_models = int(most)
            except ValueError as error:
                self.errors.append(str(error))

    def _read_residency(self, families: Families) -> None:
        series, counts = families.get(ENGINE_VLLM["loaded"], ()), families.get(ENGINE_VLLM["gpu_loaded"], ())
        if slots := families.get(ENGINE_VLLM["gpu_slots"], ()):
            self.max_active_models = int(max(sample.value for sample in slots))
        if not series and not counts:
            return
        self.loaded = {}
        for sample in series:
            name, level = sample.labels.get("adapter_name", ""), sample.labels.get("level", "")
            if name and sample.value and self.loaded.get(name, ("cpu", False))[0] != "gpu":
                self.loaded[name] = (level, sample.labels.get("pinned") == "true")
        for sample in counts:
            self.num_gpu_loaded = int(max(each.value for each in counts))
            self.base_model = sample.labels.get("model_name", "")

    def _newest(self, families: Families, key: str) -> Sample | None:
        name = ENGINE_VLLM[key]
        samples = families.get(name, ())
        if not samples:
            self.errors.append(f"metric family {name!r} not found")
            return None
        return max(samples, key=lambda sample: 0 if sample.timestamp is None else float(sample.timestamp))


def _split(names: str) -> set[str]:
    return {name.strip() for name in names.split(",") if name.strip()}
