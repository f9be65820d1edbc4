"""What the gate tells about a checkpoint it lets in, and the agreement it asks for between config and keys."""

from __future__ import annotations

import json
import time

import pytest

from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.errors import AdapterInvalid, MalformedUpload
from tests.attacks.hostile import base_of, honest, with_config


def test_summary() -> None:
    files = honest("lora_saved", "gpt2")
    summary = inspect(files, base_of("gpt2"), GateLimits()).summary
    assert (summary.peft_type, summary.task_type, summary.base) == ("LORA", "CAUSAL_LM", None)
    assert summary.rank == 4
    assert summary.num_bytes == files.num_bytes
    assert summary.modules == ("c_attn", "c_proj", "lm_head", "ln_1")
    assert summary.num_sites == 2 * 3 + 2 + 1
    assert summary.num_tensors == 2 * 3 * 2 + 2 * 2 + 1
    assert summary.warnings == ()


def test_id_is_the_digest_of_all_files() -> None:
    files = honest()
    inspected = inspect(files, base_of("llama"), GateLimits())
    assert inspected.id == files.digest()
    profiled = CheckpointFiles(config=files.config, weights=files.weights, profile=b"{}")
    assert inspect(profiled, base_of("llama"), GateLimits()).id != inspected.id


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"base_model_name_or_path": "someone/other"}, "was trained on 'someone/other'"),
        ({"peft_version": "0.99.0"}, "newer than this server knows"),
        ({"peft_version": "1.0"}, "newer than this server knows"),
    ],
)
def test_what_differs_and_may_be_right_is_a_warning(changes: dict[str, object], warning: str) -> None:
    summary = inspect(with_config(honest(), **changes), base_of("llama"), GateLimits()).summary
    assert any(warning in text for text in summary.warnings)


@pytest.mark.parametrize("name", ["tiny", "hub/TINY", "/somewhere/tiny/"])
def test_the_same_base_under_another_path_is_no_warning(name: str) -> None:
    files = with_config(honest(), base_model_name_or_path=name, peft_version="0.dev")
    assert inspect(files, base_of("llama"), GateLimits()).summary.warnings == ()


def test_other_files_are_named() -> None:
    files = honest()
    more = CheckpointFiles(config=files.config, weights=files.weights, ignored=("README.md",))
    assert inspect(more, base_of("llama"), GateLimits()).summary.warnings == ("file 'README.md' is not read",)


def test_profile_is_read_and_its_refusals_join_the_others() -> None:
    files = honest()
    good = CheckpointFiles(config=files.config, weights=files.weights, profile=b'{"labels": ["a", "b"]}')
    assert inspect(good, base_of("llama"), GateLimits()).profile.labels == ("a", "b")
    bad = CheckpointFiles(config=with_config(files, r=0).config, weights=files.weights, profile=b'{"template": "{x}"}')
    with pytest.raises(AdapterInvalid) as refused:
        inspect(bad, base_of("llama"), GateLimits())
    assert {e.path for e in refused.value.errors} == {"adapter_config.json: r", "peft_serve.json: template"}
    unreadable = CheckpointFiles(config=files.config, weights=files.weights, profile=b"{")
    with pytest.raises(MalformedUpload, match=r"peft_serve\.json"):
        inspect(unreadable, base_of("llama"), GateLimits())


def test_config_of_an_old_peft_is_read() -> None:
    """Fields that later versions dropped say nothing when they are empty; those added since are absent."""
    old = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "bias": "none",
        "enable_lora": None,
        "merge_weights": False,
        "fan_in_fan_out": False,
        "task_type": "CAUSAL_LM",
    }
    files = CheckpointFiles(config=json.dumps(old).encode(), weights=honest().weights)
    assert inspect(files, base_of("llama"), GateLimits()).summary.rank == 4


def test_nothing_is_copied_before_the_compiler() -> None:
    files = honest()
    inspected = inspect(files, base_of("llama"), GateLimits())
    for site in inspected.binding.sites.values():
        for tensor in site.method.values():
            assert tensor.content.obj is files.weights
            assert tensor.content.readonly


def test_gate_is_fast_for_small_files() -> None:
    files, base = honest(), base_of("llama")
    inspect(files, base, GateLimits())
    times = []
    for _ in range(5):
        start = time.perf_counter()
        inspect(files, base, GateLimits())
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1


def test_names_of_targets_that_cover_a_hostile_number_of_modules_stay_fast() -> None:
    many = [f"m{i}" for i in range(7000)]
    start = time.perf_counter()
    files = with_config(honest(), target_modules=["q_proj", "v_proj", "down_proj", *many])
    inspect(files, base_of("llama"), GateLimits())
    pattern = {f"a.b{i}": 4 for i in range(3000)}
    inspect(with_config(honest(), rank_pattern=pattern), base_of("llama"), GateLimits())
    assert time.perf_counter() - start < 2
