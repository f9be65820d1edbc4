"""Configs that would make a trusting loader change the base, run a pattern, import a module, or guess."""

from __future__ import annotations

import json
import time

import pytest

from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.methods import METHODS
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.errors import AdapterInvalid, MalformedUpload
from tests.attacks.hostile import admit, honest, with_config

REFUSED = [
    ("init_lora_weights", "pissa_niter_4", "path_initial_model_for_weight_conversion"),
    ("init_lora_weights", "corda", "path_initial_model_for_weight_conversion"),
    ("init_lora_weights", "loftq", "path_initial_model_for_weight_conversion"),
    ("init_lora_weights", 3, "true, false or one of"),
    ("layer_replication", [[0, 2], [0, 2]], "deeper"),
    ("megatron_config", {"tensor_model_parallel_size": 2}, "Megatron"),
    ("arrow_config", {"arrow_top_k": 1}, "Arrow"),
    ("use_qalora", "yes", "true or false"),
    ("use_bdlora", {"nblocks": 2}, "match_strict"),
    ("alora_invocation_tokens", [1, 64], "vocabulary"),
    ("target_parameters", ["experts.weight"], "no parameter"),
    ("trainable_token_indices", [1], "has no tensors"),
    ("kasa_config", {"a": 1}, "is missing"),
    ("loftq_config", {"loftq_bits": 4}, "conversion"),
    ("something_new", "x", "does not know"),
    ("r", 0, "integer"),
    ("r", "4", "integer"),
    ("r", True, "integer"),
    ("r", ..., "integer"),
    ("r", 2**70, "integer"),
    ("lora_alpha", "8", "number"),
    ("lora_alpha", 1e30, "number"),
    ("lora_alpha", None, "number"),
    ("use_dora", "yes", "true or false"),
    ("use_rslora", 1, "true or false"),
    ("bias", "some", "one of none"),
    ("task_type", "EVERYTHING", "one of"),
    ("task_type", "SEQ_CLS", "task head"),
    ("task_type", "TOKEN_CLS", "task head"),
    ("modules_to_save", "lm_head", "list"),
    ("modules_to_save", ["lm_head"], "no tensors"),
    ("modules_to_save", ["x"] * 300, "at most 256"),
    ("rank_pattern", {"(a+)+$": 4}, "regular expression"),
    ("rank_pattern", {".*q_proj": 4}, "regular expression"),
    ("rank_pattern", {"q_proj": "4"}, "integer"),
    ("rank_pattern", {"q_proj": 3}, "shape"),
    ("alpha_pattern", {"q_proj": [1]}, "number"),
    ("layers_to_transform", [0], "not named by target_modules"),
    ("layers_to_transform", "0", "layer number"),
    ("target_modules", 7, "list of module names"),
    ("target_modules", ["q_proj", "v_proj"], "not named by target_modules"),
    ("target_modules", ["q_proj", "v_proj", "down_proj", "up_proj"], "has no tensors"),
    ("exclude_modules", ["v_proj"], "not named by target_modules"),
    ("base_model_name_or_path", 5, "string"),
]


@pytest.mark.parametrize(("field", "value", "reason"), REFUSED, ids=[f"{f}-{i}" for i, (f, _, _) in enumerate(REFUSED)])
def test_field_is_refused_by_name(field: str, value: object, reason: str) -> None:
    with pytest.raises(AdapterInvalid) as refused:
        admit(with_config(honest(), **{field: value}))
    assert any(reason in error.reason for error in refused.value.errors), refused.value.errors


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("inference_mode", "whatever"),
        ("lora_dropout", 0.5),
        ("fan_in_fan_out", True),
        ("eva_config", {"rho": 2}),
        ("megatron_core", "os"),
        ("auto_mapping", {"parent_library": "os", "base_model_class": "system"}),
        ("something_new", None),
        ("something_new", {}),
        ("init_lora_weights", "gaussian"),
        ("base_model_name_or_path", "../../etc/passwd"),
        ("rank_pattern", {"^model.layers.0.self_attn.q_proj$": 4}),
    ],
)
def test_inert_field_changes_nothing(field: str, value: object) -> None:
    plain, changed = admit(honest()), admit(with_config(honest(), **{field: value}))
    assert all(a.equal(b) for a, b in zip(plain.tensors(), changed.tensors(), strict=True))


def test_catastrophic_regular_expression_is_never_run() -> None:
    start = time.perf_counter()
    admit(with_config(honest(), target_modules="([a-z._0-9]+)+\\$", exclude_modules="(a+)+b"))
    admit(with_config(honest(), layers_to_transform=[0], layers_pattern="(a+)+$"))
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"peft_type": "LORA", "peft_type": "IA3"}',
        b'{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}',
        b'{"peft_type": "LORA", "r": 4, "lora_alpha": Infinity}',
        b'{"peft_type": "LORA", "r": 4, "lora_alpha": 1e999}',
        b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}",
        b'{"a": ' + b"[" * 60_000 + b"]" * 5,
        b'{"a": ' + b'{"a":' * 30 + b"1" + b"}" * 31,
        b'{"a": [["\\ud800"]]}',
        b'{"a": "\xff"}',
        '{"peft_type": "LORA"}'.encode("utf-16"),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n",
        b'{"a": "' + b"x" * 600_000 + b'"}',
    ],
    ids=range(16),
)
def test_unreadable_config(content: bytes) -> None:
    with pytest.raises(MalformedUpload) as refused:
        admit(CheckpointFiles(config=content, weights=honest().weights))
    assert "adapter_config.json" in refused.value.message
    assert len(refused.value.message) < 400


@pytest.mark.parametrize("peft_type", ["XLORA", "lora", "", None, 3, ["LORA"], "__class__"])
def test_unknown_type_is_refused_with_what_is_served(peft_type: object) -> None:
    with pytest.raises(AdapterInvalid) as refused:
        admit(with_config(honest(), peft_type=peft_type))
    served = refused.value.message.rpartition("served are ")[2].split(", ")
    assert served == sorted(METHODS)


@pytest.mark.parametrize(
    ("peft_type", "reason"),
    [("XLORA", "upload the adapters that it mixes"), ("LILY", "rows of a batch"), ("SHADOW", "second network")],
)
def test_type_that_cannot_be_served_is_refused_with_the_way_out(peft_type: str, reason: str) -> None:
    with pytest.raises(AdapterInvalid) as refused:
        admit(with_config(honest(), peft_type=peft_type))
    assert reason in refused.value.errors[0].reason


def test_all_reasons_are_told_at_once_and_at_most_ten() -> None:
    with pytest.raises(AdapterInvalid) as refused:
        admit(with_config(honest(), r=0, use_dora="yes", layer_replication=[[0, 1]]))
    assert len(refused.value.errors) == 3
    with pytest.raises(AdapterInvalid) as refused:
        admit(with_config(honest(), **{f"unknown_{i}": 1 for i in range(40)}))
    assert len(refused.value.errors) == 10


@pytest.mark.parametrize(
    ("method", "changes", "reason"),
    [
        ("prompt_tuning", {"num_virtual_tokens": 4}, "shape"),
        ("prompt_tuning", {"num_virtual_tokens": 0}, "integer"),
        ("prompt_tuning", {"num_virtual_tokens": 1 << 19}, "--max-virtual-tokens"),
        ("prompt_tuning", {"token_dim": 16}, "served base has 32"),
        ("prompt_tuning", {"num_transformer_submodules": 2}, "decoder-only"),
        ("prompt_tuning", {"task_type": "SEQ_2_SEQ_LM"}, "decoder-only"),
        ("prompt_tuning", {"prompt_tuning_init_state_dict_path": "/tmp/x"}, "does not know"),
        ("prefix_tuning", {"num_layers": 3}, "served base has 2"),
        ("prefix_tuning", {"num_attention_heads": 4}, "served base has 2"),
        ("p_tuning", {"num_virtual_tokens": None}, "integer"),
        ("ia3", {"r": 4}, "does not know"),
        ("ln_tuning", {"target_modules": ["norm"]}, "not named"),
    ],
)
def test_other_methods_have_their_own_schema(method: str, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(AdapterInvalid) as refused:
        admit(with_config(honest(method), **changes))
    assert any(reason in error.reason for error in refused.value.errors), refused.value.errors


def test_limits_of_the_operator_name_their_option() -> None:
    with pytest.raises(AdapterInvalid, match=r"has rank 4; this server was started with --max-rank 2; retrain"):
        admit(honest(), limits=GateLimits(max_rank=2))
    with pytest.raises(AdapterInvalid, match=r"--max-virtual-tokens 2"):
        admit(honest("prompt_tuning"), limits=GateLimits(max_virtual_tokens=2))
    with pytest.raises(AdapterInvalid, match=r"--max-adapter-bytes"):
        admit(honest(), limits=GateLimits(max_adapter_bytes=100))


def test_config_of_one_kilobyte_per_reason_is_not_echoed() -> None:
    with pytest.raises(AdapterInvalid) as refused:
        admit(with_config(honest(), lora_alpha="x" * 20_000, **{"y" * 20_000: 1}))
    assert sum(len(e.reason) + len(e.path) for e in refused.value.errors) < 1500
    assert json.dumps([e.reason for e in refused.value.errors]).isascii()
