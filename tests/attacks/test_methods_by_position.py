"""Hostile checkpoints of LoRA's variants, rotations, token rows, gated prompts and what stands in front."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.primitives import Affine
from peft_serve.errors import AdapterInvalid
from tests.attacks.hostile import PREFIX, Q0, admit, honest, with_config, with_tensors

METHODS = (
    ("lora_blocks", "llama"),
    ("lora_kasa", "llama"),
    ("lora_tokens", "llama"),
    ("lora_experts_both", "mixtral"),
    ("trainable_tokens", "llama"),
    ("oft", "llama"),
    ("oft_shared", "t5"),
    ("boft", "llama"),
    ("road_1", "llama"),
    ("beft", "llama"),
    ("adaption_prompt", "gpt2"),
    ("multitask_prompt_tuning", "llama"),
    ("cpt", "llama"),
    ("cartridge", "t5"),
)
IDS = [f"{kind}-{method}" for method, kind in METHODS]
every_method = pytest.mark.parametrize(("method", "kind"), METHODS, ids=IDS)


def one_of_each(method: str, kind: str) -> list[str]:
    """A tensor's name for each suffix that the method saves."""
    return sorted({name[-24:]: name for name in tensors_of(method, kind)}.values())


def tensors_of(method: str, kind: str) -> dict[str, Tensor]:
    return load(honest(method, kind).weights)


def refuse(method: str, kind: str, change: Callable[[dict[str, Tensor]], None]) -> str:
    with pytest.raises(AdapterInvalid) as refused:
        admit(with_tensors(honest(method, kind), change), kind)
    return " | ".join(f"{error.path}: {error.reason}" for error in refused.value.errors)


@every_method
def test_honest_checkpoint_is_let_in(method: str, kind: str) -> None:
    adapter = admit(honest(method, kind), kind)
    assert adapter.sites or adapter.prompt or adapter.prefix


@every_method
def test_missing_tensor(method: str, kind: str) -> None:
    for name in one_of_each(method, kind):
        reason = refuse(method, kind, lambda t, name=name: t.pop(name))
        assert "missing" in reason or "no tensors" in reason or "nothing that acts" in reason


@every_method
def test_extra_tensor(method: str, kind: str) -> None:
    name = next(iter(tensors_of(method, kind)))
    reason = refuse(method, kind, lambda t: t.update({f"{name}_too": torch.ones(2)}))
    assert "not a tensor of" in reason or "not a key of" in reason or "names no module" in reason


@every_method
def test_wrong_shape(method: str, kind: str) -> None:
    for name in one_of_each(method, kind):

        def longer(tensors: dict[str, Tensor], name: str = name) -> None:
            tensors[name] = torch.cat([tensors[name], tensors[name][:1]])

        assert "has shape" in refuse(method, kind, longer)
        assert "has shape" in refuse(method, kind, lambda t, name=name: t.update({name: t[name][None].contiguous()}))


@every_method
def test_wrong_numbers(method: str, kind: str) -> None:
    for name in one_of_each(method, kind):
        assert "has dtype" in refuse(method, kind, lambda t, name=name: t.update({name: t[name].int()}))
        assert "NaN" in refuse(method, kind, lambda t, name=name: t[name].view(-1)[:1].fill_(float("nan")))


CONFIGS: list[tuple[str, str, dict[str, object], str]] = [
    ("lora_blocks", "llama", {"use_bdlora": True}, "BdLoraConfig"),
    ("lora_blocks", "llama", {"use_bdlora": {"nblocks": 0}}, "nblocks"),
    ("lora_blocks", "llama", {"use_bdlora": {"nblocks": 3, "target_modules_bd_a": ["proj"]}}, "does not divide"),
    ("lora_blocks", "llama", {"use_bdlora": {"more": 1}}, "without the field"),
    ("lora_blocks", "llama", {"use_bdlora": {"target_modules_bd_a": "q_proj"}}, "list of module names"),
    (
        "lora_blocks",
        "llama",
        {"use_bdlora": {"target_modules_bd_a": ["proj"], "target_modules_bd_b": ["q_proj"]}},
        "both factors",
    ),
    ("lora_blocks", "llama", {"use_dora": True}, "not defined together"),
    ("lora_blocks", "llama", {"use_bdlora": None}, "has shape"),
    ("lora_kasa", "llama", {"kasa_config": None}, "not a tensor of LORA"),
    ("lora_kasa", "llama", {"kasa_config": "yes"}, "an object"),
    ("lora_kasa", "llama", {"use_dora": True}, "not defined together"),
    ("lora_kasa", "llama", {"r": 32}, "smaller side"),
    ("lora_kasa", "llama", {"init_lora_weights": "mica"}, "MiCA"),
    ("lora_activated", "llama", {"alora_invocation_tokens": [64]}, "vocabulary"),
    ("lora_activated", "llama", {"alora_invocation_tokens": [-1]}, "token ids"),
    ("lora_activated", "llama", {"alora_invocation_tokens": [True]}, "token ids"),
    ("lora_activated", "llama", {"alora_invocation_tokens": [1] * 2000}, "at most 1024"),
    ("lora_activated", "llama", {"alora_invocation_tokens": "<go>"}, "token ids"),
    ("lora_activated", "llama", {"bias": "all"}, "acts before"),
    ("lora_activated", "llama", {"modules_to_save": ["norm"]}, "acts before"),
    ("lora_activated", "llama", {"init_lora_weights": "pissa"}, "acts before"),
    ("lora", "t5", {"alora_invocation_tokens": [3]}, "decoder-only"),
    ("lora", "gpt2", {"init_lora_weights": "olora"}, "Conv1D"),
    ("lora", "gpt2", {"kasa_config": {"beta": 1}}, "Conv1D"),
    ("lora_embedding", "llama", {"alora_invocation_tokens": [3]}, "an embedding"),
    ("lora", "llama", {"use_qalora": True, "qalora_group_size": 0}, "integer"),
    ("lora_pissa", "llama", {"init_lora_weights": "pissa_niter_3"}, "randomised SVD"),
    ("lora_pissa", "llama", {"init_lora_weights": "corda"}, "calibrated"),
    ("lora_tokens", "llama", {"trainable_token_indices": [17, 22, 5, 40]}, "has shape"),
    ("lora_tokens", "llama", {"trainable_token_indices": [17, 22, 5, 40, 64]}, "64 rows"),
    ("lora_tokens", "llama", {"trainable_token_indices": [17, 22, 5, 40, 17]}, "each once"),
    ("lora_tokens", "llama", {"trainable_token_indices": [17, 22, 5, 40, -1]}, "token ids"),
    ("lora_tokens", "llama", {"trainable_token_indices": {"norm": [1, 2, 3, 4, 5]}}, "names no token ids"),
    ("lora_tokens", "llama", {"trainable_token_indices": {"embed_tokens": 3}}, "token ids"),
    ("lora_tokens", "llama", {"trainable_token_indices": None}, "names no token ids"),
    ("lora_tokens", "llama", {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}, "no tensors"),
    ("trainable_tokens", "llama", {"token_indices": 3}, "token ids"),
    ("trainable_tokens", "llama", {"token_indices": []}, "names no token ids"),
    ("trainable_tokens", "llama", {"token_indices": [1, 2, 3, 4, 1 << 40]}, "token ids"),
    ("lora_experts", "mixtral", {"target_parameters": "mlp.experts.gate_up_proj"}, "list"),
    ("lora_experts", "mixtral", {"target_parameters": ["mlp.experts.down_proj"]}, "has shape"),
    ("lora_experts", "mixtral", {"target_parameters": ["mlp.experts.gate_up_proj", "down_proj"]}, "is missing"),
    ("lora_experts", "mixtral", {"target_parameters": ["nothing"]}, "no parameter"),
    ("lora_experts", "mixtral", {"target_parameters": None}, "names no parameter"),
    ("lora_experts", "mixtral", {"use_dora": True}, "not defined together"),
    ("lora_experts", "mixtral", {"init_lora_weights": "olora"}, "not defined together"),
    ("lora_experts", "gpt_oss", {"target_parameters": ["gate_up_proj_bias"]}, "stacks of matrices"),
    ("lora_experts", "mixtral", {"rank_pattern": {"experts.gate_up_proj": 1 << 19}}, "--max-rank"),
    ("lora_router", "mixtral", {"target_parameters": ["gate.weight"]}, "names no parameter"),
    (
        "lora_router",
        "mixtral",
        {"target_parameters": ["experts.down_proj"]},
        "names no parameter of model.layers.0.mlp.gate",
    ),
    ("lora_router", "gpt_oss", {"target_parameters": ["experts.down_proj", "router.bias"]}, "no other matrix"),
    ("lora_router", "mixtral", {"rank_pattern": {"gate.weight": 1}}, "has shape"),
    ("lora_router", "mixtral", {"use_dora": True}, "not defined together"),
    ("lora_router", "mixtral", {"lora_bias": True}, "not defined together"),
    ("oft", "llama", {"oft_block_size": None}, "retrain"),
    ("oft", "llama", {"oft_block_size": 0}, "exactly one"),
    ("oft", "llama", {"r": 4}, "exactly one"),
    ("oft", "llama", {"oft_block_size": 1 << 20}, "has shape"),
    ("oft", "llama", {"oft_block_size": -8}, "integer"),
    ("oft", "llama", {"peft_version": None}, "is older than 0.18"),
    ("oft", "llama", {"peft_version": "0.17.1"}, "is older than 0.18"),
    ("oft", "llama", {"peft_version": "0.18.0.dev0@0a1b"}, "is older than 0.18"),
    ("oft", "llama", {"peft_version": "new"}, "is older than 0.18"),
    ("oft", "llama", {"use_cayley_neumann": None, "peft_version": "0.17.1"}, "is older than 0.18"),
    ("oft", "llama", {"num_cayley_neumann_terms": 1 << 30}, "integer"),
    ("oft", "llama", {"eps": "small"}, "number"),
    ("oft", "llama", {"block_share": True}, "has shape"),
    ("boft", "llama", {"boft_block_size": 0}, "exactly one"),
    ("boft", "llama", {"boft_block_size": 5}, "does not divide"),
    ("boft", "llama", {"boft_block_size": None, "boft_block_num": 3}, "exactly one"),
    ("boft", "llama", {"boft_n_butterfly_factor": 64}, "integer"),
    ("road_1", "llama", {"variant": "road_3"}, "one of"),
    ("road_1", "llama", {"variant": "road_2"}, "has shape"),
    ("road_1", "llama", {"group_size": 7}, "even"),
    ("road_1", "llama", {"group_size": 64}, "divide"),
    ("beft", "llama", {"r": 4}, "does not know"),
    ("adaption_prompt", "gpt2", {"adapter_len": 1 << 20}, "--max-virtual-tokens"),
    ("adaption_prompt", "gpt2", {"adapter_len": 1024}, "has shape"),
    ("adaption_prompt", "gpt2", {"adapter_len": None}, "integer"),
    ("adaption_prompt", "gpt2", {"adapter_layers": 2}, "no tensors"),
    ("adaption_prompt", "gpt2", {"adapter_layers": 3}, "more than the 2 layers"),
    ("adaption_prompt_everywhere", "gpt2", {"adapter_layers": 1}, "not named"),
    ("adaption_prompt", "gpt2", {"target_modules": "(a+)+$"}, "the attention of"),
    ("multitask_prompt_tuning", "llama", {"num_tasks": 1 << 19}, "has shape"),
    ("multitask_prompt_tuning", "llama", {"num_tasks": 0}, "integer"),
    ("multitask_prompt_tuning", "llama", {"num_ranks": 3}, "has shape"),
    ("multitask_prompt_tuning", "llama", {"num_virtual_tokens": 1 << 19}, "--max-virtual-tokens"),
    ("cpt", "llama", {"task_type": "SEQ_CLS"}, "CAUSAL_LM"),
    ("cpt", "llama", {"num_virtual_tokens": 4}, "has shape"),
    ("cartridge", "llama", {"num_layers": 5}, "served base has"),
]


@pytest.mark.parametrize(
    ("method", "kind", "changes", "reason"), CONFIGS, ids=[f"{i}-{row[0]}" for i, row in enumerate(CONFIGS)]
)
def test_config_is_refused_with_the_reason(method: str, kind: str, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(AdapterInvalid) as refused:
        admit(with_config(honest(method, kind), **changes), kind)
    assert any(reason in error.reason for error in refused.value.errors), refused.value.errors


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_gated_prompt_on_a_family_without_them(kind: str) -> None:
    with pytest.raises(AdapterInvalid, match="which peft defines for llama, mistral, gpt2"):
        admit(honest("adaption_prompt", "llama"), kind)


def test_rotations_of_an_old_peft_are_refused_by_their_key() -> None:
    name = f"{PREFIX}{Q0}.oft_R.weight"
    reason = refuse("oft", "llama", lambda t: t.update({name.replace("oft_R.weight", "oft_r"): t.pop(name)}))
    assert "peft 0.15 or older" in reason


def test_rows_of_a_retrained_table() -> None:
    """A head that shares the embedding's weight cannot be retrained and have the embedding's rows."""
    files = with_config(honest("lora_tokens", "llama_tied"), modules_to_save=["lm_head"])
    changed = with_tensors(files, lambda t: t.update({f"{PREFIX}lm_head.weight": torch.ones(64, 32)}))
    with pytest.raises(AdapterInvalid, match="whose rows are trained"):
        admit(changed, "llama_tied")


def test_rows_of_the_embedding_are_those_of_a_tied_head() -> None:
    """peft saves them at both places and reads them as one."""
    files = honest("trainable_tokens", "llama_tied")
    cut = with_tensors(files, lambda t: t.__delitem__(f"{PREFIX}lm_head.trainable_tokens_delta"))
    whole, head = admit(files, "llama_tied"), admit(cut, "llama_tied").sites["lm_head"]
    assert isinstance(head, Affine)
    assert head.rows is not None
    assert torch.equal(head.rows.values_ND, whole.sites["lm_head"].rows.values_ND)
    reason = refuse(
        "trainable_tokens", "llama_tied", lambda t: t.__delitem__(f"{PREFIX}model.embed_tokens.trainable_tokens_delta")
    )
    assert "no tensors" in reason


def test_rows_that_a_tied_head_has_otherwise() -> None:
    name = f"{PREFIX}lm_head.trainable_tokens_delta"
    reason = refuse("trainable_tokens", "llama_tied", lambda t: t.update({name: t[name] + 1}))
    assert "other values for the same rows" in reason


def test_rows_and_low_rank_term_at_one_table() -> None:
    """peft cannot make such a file: it wraps a table with one of them."""
    path = f"{PREFIX}model.embed_tokens"
    term = {f"{path}.lora_embedding_A": torch.ones(4, 64), f"{path}.lora_embedding_B": torch.ones(32, 4)}
    assert "not a tensor of LORA" in refuse("lora_tokens", "llama", lambda t: t.update(term))


def test_copy_of_a_table_beside_a_rotation() -> None:
    """Only a term that fits any weight may bring its own."""
    name = f"{PREFIX}model.embed_tokens.base_layer.weight"
    assert "differs from" in refuse("oft_embedding", "llama", lambda t: t.update({name: t[name] + 1}))
    adapter = admit(honest("oft_embedding"))
    edit = adapter.sites["model.embed_tokens"]
    assert isinstance(edit, Affine)
    assert edit.out_mix is not None


@pytest.mark.parametrize("suffix", ["experts.gate_up_proj", "experts.base_layer.gate_up_proj", "experts.weight"])
def test_whole_experts_are_refused(suffix: str) -> None:
    name = f"{PREFIX}model.layers.0.mlp.{suffix}"
    files = with_tensors(honest("lora", "mixtral"), lambda t: t.update({name: torch.ones(4, 96, 32)}))
    for saved in (None, ["experts"]):
        with pytest.raises(AdapterInvalid):
            admit(with_config(files, modules_to_save=saved), "mixtral")


def test_modules_to_save_never_means_an_attention_as_such() -> None:
    """Its projections can be retrained; the attention has no parameters of its own."""
    with pytest.raises(AdapterInvalid) as refused:
        admit(with_config(honest("lora"), modules_to_save=["self_attn"]))
    named = {error.path for error in refused.value.errors}
    assert "model.layers.0.self_attn" not in named
    assert "model.layers.0.self_attn.k_proj" in named


def test_doubled_rank_counts_against_the_limit() -> None:
    """A term for the change of the base is as large as the adapter's own."""
    for method in ("lora_pissa", "lora_olora", "lora_kasa"):
        with pytest.raises(AdapterInvalid, match="has rank 8; this server was started with --max-rank 7"):
            admit(honest(method), limits=GateLimits(max_rank=7))
    admit(honest("lora"), limits=GateLimits(max_rank=7))


def test_values_that_no_rotation_survives() -> None:
    """A Cayley map is defined for all parameters; a power series of large ones is not finite."""
    huge = with_tensors(honest("oft"), lambda t: t.update({name: torch.full_like(v, 60000.0) for name, v in t.items()}))
    admit(with_config(huge, use_cayley_neumann=False))
    with pytest.raises(AdapterInvalid, match="not finite after compilation"):
        admit(with_config(huge, num_cayley_neumann_terms=20))


@pytest.mark.parametrize("changes", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_change_of_a_weight_that_others_share(changes: dict[str, object]) -> None:
    """peft would change the embedding too."""
    with pytest.raises(AdapterInvalid, match=r"it shares with model\.embed_tokens"):
        admit(with_config(honest("lora_head", "llama_tied"), **changes), "llama_tied")


def test_lengths_learned_with_trained_rows() -> None:
    path = f"{PREFIX}lm_head.lora_magnitude_vector"

    def with_lengths(tensors: dict[str, Tensor]) -> None:
        tensors |= {f"{PREFIX}{Q0}.lora_magnitude_vector": torch.ones(32), path: torch.ones(64)}
        tensors[f"{PREFIX}model.layers.1.self_attn.q_proj.lora_magnitude_vector"] = torch.ones(32)

    files = with_config(with_tensors(honest("lora_tokens_under_head", "llama_tied"), with_lengths), use_dora=True)
    with pytest.raises(AdapterInvalid, match="train without DoRA"):
        admit(files, "llama_tied")
