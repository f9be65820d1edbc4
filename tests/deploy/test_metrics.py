"""Every metric that is promised is there and moves, as gateways and dashboards made for vLLM read it."""

from __future__ import annotations

import time

import pytest

from peft_serve import __version__
from peft_serve.metrics import ENGINE_STATES
from tests.deploy.conftest import Load

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
    "peft_serve_step_time_model_seconds": {},  # of which term, a few steps on a busy machine cannot tell
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
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"):
        assert load.after.types[f"vllm:{name}"] == "gauge"
