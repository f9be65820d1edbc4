"""Every metric that is promised is there and moves, as gateways and dashboards made for vLLM read it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from peft_serve import __version__
from peft_serve.core import AdapterId
from peft_serve.engine.snapshot import EngineSnapshot
from peft_serve.metrics import ENGINE_STATES
from tests.api.api_fakes import FakeEngine, make_world
from tests.api.conftest import http, populate
from tests.deploy.conftest import Load
from tests.deploy.pages import Page

COUNTED = {
    "vllm:time_to_first_token_seconds_count": {},
    "vllm:inter_token_latency_seconds_count": {},
    "vllm:e2e_request_latency_seconds_count": {},
    "vllm:request_queue_time_seconds_count": {},
    "vllm:request_prefill_time_seconds_count": {},
    "vllm:request_decode_time_seconds_count": {},
    "vllm:request_prompt_tokens_sum": {},
    "vllm:request_generation_tokens_sum": {},
    "vllm:prompt_tokens_total": {},
    "vllm:generation_tokens_total": {},
    "vllm:iteration_tokens_total_sum": {},
    "vllm:prefix_cache_queries_total": {},
    "vllm:prefix_cache_hits_total": {},
    "vllm:request_success_total": {"finished_reason": "length"},
    "peft_serve_adapter_requests_total": {"adapter": "a", "method": "LORA", "outcome": "ok"},
    "peft_serve_adapter_tokens_total": {"adapter": "b", "kind": "output"},
    "peft_serve_adapter_cache_hits_total": {"tier": "device"},
    "peft_serve_adapter_cache_misses_total": {"tier": "host"},
    "peft_serve_adapter_cache_loaded_bytes_total": {"tier": "device"},
    "peft_serve_adapter_evictions_total": {"tier": "device"},
    "peft_serve_adapter_load_seconds_count": {"tier": "host"},
    "peft_serve_compiled_cache_total": {"outcome": "hit"},
    "peft_serve_adapter_uploads_total": {"outcome": "created"},
    "peft_serve_step_seconds_count": {},
    "peft_serve_step_rows_sum": {},
    "peft_serve_step_distinct_adapters_sum": {},
    "peft_serve_step_time_model_seconds": {"per": "step"},
    "process_cpu_seconds_total": {},
}


@pytest.mark.parametrize("name", COUNTED)
def test_what_is_counted_moves(load: Load, name: str) -> None:
    labels: dict[str, str] = COUNTED[name]
    assert load.after.total(name, **labels) > load.before.total(name, **labels)


def test_an_outcome_is_counted_under_its_own_name(load: Load) -> None:
    for outcome, count in (("created", 2), ("unchanged", 2), ("refused", 1), ("failed", 0)):
        assert load.after.total("peft_serve_adapter_uploads_total", outcome=outcome) == count
    assert load.after.total("peft_serve_adapter_evictions_total", tier="host") > 0


def test_the_moments_state_is_told_at_the_moment(load: Load) -> None:
    assert load.busy.total("vllm:num_requests_running") == 1
    assert 1 <= load.busy.total("vllm:num_requests_waiting") <= 3
    assert 0 < load.busy.total("vllm:kv_cache_usage_perc") <= 1
    assert load.after.total("vllm:num_requests_running") == 0
    assert load.after.total("vllm:num_requests_waiting") == 0
    resident = list(load.after.having("peft_serve_adapter_resident", tier="device"))
    assert len(resident) == 1, "there is one slot"
    assert load.after.total("peft_serve_adapter_bytes", tier="device") > 0
    assert load.before.total("peft_serve_adapter_bytes", tier="device") == 0


def test_what_never_moves_says_how_things_are(load: Load) -> None:
    for seen in (load.before, load.after):
        assert seen.total("peft_serve_base_fingerprint_ok") == 1
        assert seen.total("peft_serve_step_padding_ratio") == 0
        states = {labels["state"]: value for labels, value in seen.samples["peft_serve_engine_state"]}
        assert states == {state: float(state == "running") for state in ENGINE_STATES}
        ((labels, value),) = seen.samples["vllm:cache_config_info"]
        assert (labels["block_size"], value) == ("4", 1)
        assert int(labels["num_gpu_blocks"]) > 0
        ((labels, value),) = seen.samples["peft_serve_build_info"]
        assert (labels["version"], labels["dtype"], labels["device"], value) == (__version__, "float32", "cpu", 1)
        assert labels["base"] == "LlamaForCausalLM"
    assert load.after.total("process_resident_memory_bytes") > 0
    assert load.after.total("process_start_time_seconds") < time.time()


def test_a_dashboard_made_for_vllm_finds_the_model(load: Load) -> None:
    """Its panels all say `{model_name="$model_name"}`."""
    unlabelled = {"vllm:cache_config_info", "vllm:lora_requests_info"}  # as vLLM has them
    for name in load.after.samples:
        if name.startswith("vllm:") and name not in unlabelled:
            assert load.after.values(name, "model_name") == {"base"}, name


def test_families_have_the_types_that_gateways_expect(load: Load) -> None:
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "lora_requests_info"):
        assert load.after.types[f"vllm:{name}"] == "gauge"


# ---- the Gateway API inference extension's endpoint picker, as its extractor reads a page ----


@dataclass
class Endpoint:
    """What the picker schedules by."""

    waiting: int = 0
    running: int = 0
    kv_usage: float = 0.0
    active_models: set[str] = field(default_factory=set)
    waiting_models: set[str] = field(default_factory=set)
    max_active_models: int = 0
    block_size: int = 0
    num_blocks: int = 0


def extracted(seen: Page) -> Endpoint:
    """Of a family one sample counts; of the adapters' family the one with the largest value that names any."""
    endpoint = Endpoint(
        waiting=int(seen.samples["vllm:num_requests_waiting"][0][1]),
        running=int(seen.samples["vllm:num_requests_running"][0][1]),
        kv_usage=seen.samples["vllm:kv_cache_usage_perc"][0][1],
    )
    latest, latest_value = None, 0.0
    for labels, value in seen.samples["vllm:lora_requests_info"]:
        if (labels["running_lora_adapters"] or labels["waiting_lora_adapters"]) and value > latest_value:
            latest, latest_value = labels, value
    if latest is not None:
        endpoint.active_models = split(latest["running_lora_adapters"])
        endpoint.waiting_models = split(latest["waiting_lora_adapters"])
        endpoint.max_active_models = int(latest["max_lora"])
    config, _ = seen.samples["vllm:cache_config_info"][0]
    endpoint.block_size, endpoint.num_blocks = int(config["block_size"]), int(config["num_gpu_blocks"])
    return endpoint


def split(names: str) -> set[str]:
    return {name.strip() for name in names.split(",") if name.strip()}


class PickedEngine(FakeEngine):
    """The fake engine in a state that a picker has to read."""

    waiting: tuple[AdapterId, ...] = ()

    def snapshot(self) -> EngineSnapshot:
        return replace(super().snapshot(), num_running=3, num_waiting=5, kv_usage=0.25, waiting_adapters=self.waiting)


async def test_an_endpoint_picker_sees_residents_and_waiting_adapters(tiny_tokenizer: Any, tmp_path: Path) -> None:
    world = make_world(tiny_tokenizer, tmp_path)
    engine = PickedEngine(world.parts.codec)
    world = replace(world, engine=engine, parts=replace(world.parts, engine=engine))
    populate(world)
    async with http(world) as client:
        nobody = extracted(Page.read((await client.get("/metrics")).text))
        assert (nobody.waiting, nobody.running, nobody.kv_usage) == (5, 3, 0.25)
        assert (nobody.active_models, nobody.waiting_models) == (set(), set())
        for name in ("plain", "soft"):
            await client.post(f"/adapters/{name}/load")
        engine.waiting = (world.adapters["complaints"],)
        engine.start()
        await client.post("/generate?adapter=complaints", json={"inputs": "a", "parameters": {"max_new_tokens": 1}})
        engine.stop()
        for _ in range(2):  # what was told before must not stay beside it
            seen = Page.read((await client.get("/metrics")).text)
            assert len(seen.samples["vllm:lora_requests_info"]) == 1
            picked = extracted(seen)
            assert picked.waiting_models == {"complaints"}
            assert len(picked.active_models) == 2
            assert (picked.max_active_models, picked.block_size, picked.num_blocks) == (8, 16, 99)
