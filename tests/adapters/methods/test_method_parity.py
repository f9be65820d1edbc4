"""Every served method on every kind of base: compiled primitives give peft's logits."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.layout import ALIGNMENT
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.primitives import Adapter
from peft_serve.adapters.registry import TASK_FIELD
from peft_serve.core import AdapterId
from tests.adapters.checkpoints import (
    BASE_KINDS,
    HIDDEN,
    MIXTURES,
    VOCAB,
    make_base,
    make_checkpoint,
    methods_for,
    oracle_logits,
    save,
)
from tests.adapters.fake_base import FakeBase, adapted_logits

WHOLE = ("llama", "gpt2", "t5")  # a decoder with grouped heads, Conv1D with biases, an encoder-decoder
TELLING = (
    "adamss_biased",
    "glora_biased",
    "glora_biased_vector",
    "glora_biased_constant",
    "glora_biased_only",
    "adaption_prompt",
    "boft_by_number",
    "lora_bias_all",
    "lora_embedding_dora",
    "lora_experts",
    "lora_experts_both",
    "lora_router",
    "lora_mixture",
    "lora_tokens",
    "lora_tokens_by_module",
    "lora_tokens_under_head",
    "oft_bias_only",
    "oft_embedding",
    "trainable_tokens",
    "trainable_tokens_named",
    "lora_pattern",
    "lora_shared",
    "lora_tying",
    "lora_saved_tying",
    "ia3",
    "ln_tuning",
    "prompt_tuning_saved",
    "prefix_tuning",
)
ON_MIXTURES = ("lora", "lora_experts", "lora_experts_both", "lora_router", "lora_mixture", "lora_tokens")
CASES = [(kind, method) for kind in BASE_KINDS for method in methods_for(kind) if kind in WHOLE or method in TELLING]
CASES += [(kind, method) for kind in MIXTURES for method in ON_MIXTURES if method in methods_for(kind)]
# peft puts the other half in front of the decoder in training only; see the test of what it generates
CASES.remove(("t5", "multitask_prompt_tuning"))
TOLERANCE = 1e-5


@cache
def base_of(kind: str) -> FakeBase:
    return FakeBase(make_base(kind))


def sample_ids(seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(3, VOCAB, (1, 7), generator=generator),
        torch.randint(3, VOCAB, (1, 5), generator=generator),
    )


@pytest.mark.parametrize(("kind", "method"), CASES, ids=[f"{kind}-{method}" for kind, method in CASES])
def test_logits_equal_peft(kind: str, method: str) -> None:
    base = base_of(kind)
    before = base.fingerprint()
    files, oracle = make_checkpoint(method, kind, seed=1)
    adapter = compile_adapter(inspect(files, base, GateLimits()), base, GateLimits())
    ids, decoder_ids = sample_ids()
    if adapter.start:
        ids = torch.cat([ids[:, :3], torch.tensor([adapter.start]), ids[:, 3:]], dim=1)
    expected = oracle_logits(oracle, ids, decoder_ids)
    plain = adapted_logits(base, Adapter(id=AdapterId("none"), method="none"), ids, decoder_ids)
    scale = expected.abs().max()
    if not (kind.startswith("bart") or kind == "opt"):  # tiny ones hardly hear what stands in front of them
        assert (plain - expected).abs().max() > 1e-3 * scale, "the checkpoint must matter"
    assert not torch.equal(plain, expected)
    got = adapted_logits(base, adapter, ids, decoder_ids)
    assert (got - expected).abs().max() <= TOLERANCE * scale
    assert base.fingerprint() == before


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_files_act_in_float32(stored: torch.dtype) -> None:
    """peft widens an adapter's tensors when it loads them; so a bf16 file on a float32 base is float32 math."""
    from safetensors.torch import load
    from safetensors.torch import save as to_bytes

    base = base_of("llama")
    files, _ = make_checkpoint("lora", "llama")
    halves = {name: tensor.to(stored) for name, tensor in load(files.weights).items()}
    halved = type(files)(config=files.config, weights=to_bytes(halves))
    widened = type(files)(config=files.config, weights=to_bytes({n: t.float() for n, t in halves.items()}))
    first, second = (compile_adapter(inspect(f, base, GateLimits()), base, GateLimits()) for f in (halved, widened))
    for mine, other in zip(first.tensors(), second.tensors(), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, other)


def test_compiled_tensors_have_the_base_type_and_share_memory_with_nothing_else() -> None:
    model = make_base("llama").to(torch.bfloat16)
    base = FakeBase(model, dtype=torch.bfloat16)
    for method in ("lora_dora", "ln_tuning", "prefix_tuning", "prompt_tuning", "lora_saved"):
        files, _ = make_checkpoint(method, "llama")
        adapter = compile_adapter(inspect(files, base, GateLimits()), base, GateLimits())
        tensors = list(adapter.tensors())
        assert all(tensor.dtype == torch.bfloat16 for tensor in tensors)
        (piece,) = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}.values()
        assert piece.nbytes() < sum(tensor.nbytes for tensor in tensors) + ALIGNMENT * len(tensors)


def test_t5_prefix_deals_its_vectors_out_as_peft_does() -> None:
    """Three layers, six vectors: layer l takes 4 l and 4 l + 1 of them, counted around."""
    base = base_of("t5")
    files, oracle = make_checkpoint("prefix_tuning", "t5")
    adapter = compile_adapter(inspect(files, base, GateLimits()), base, GateLimits())
    rows = oracle.get_prompt_embedding_to_save("default")
    vectors = rows.view(rows.shape[0], 6, 4, 8).permute(1, 2, 0, 3)
    assert adapter.prefix is not None
    for layer, (key, value) in enumerate([(0, 1), (4, 5), (2, 3)]):
        assert torch.equal(adapter.prefix.keys_LHPD[layer], vectors[key])
        assert torch.equal(adapter.prefix.values_LHPD[layer], vectors[value])


def test_soft_prompt_of_an_encoder_decoder_is_the_first_half_of_the_rows() -> None:
    base = base_of("t5")
    files, oracle = make_checkpoint("prompt_tuning", "t5")
    adapter = compile_adapter(inspect(files, base, GateLimits()), base, GateLimits())
    rows = oracle.get_prompt_embedding_to_save("default")
    assert rows.shape == (10, HIDDEN)
    assert adapter.prompt is not None
    assert torch.equal(adapter.prompt.embeddings_PD, rows[:5])
    footprint = adapter.footprint(is_encoder_decoder=True)
    assert (footprint.num_source_tokens, footprint.num_prefix_tokens) == (5, 0)


def test_untouched_bias_leaves_no_edit() -> None:
    """bias="all" saves every bias of the base; those that training did not move cost nothing."""
    base = base_of("gpt2")
    _, oracle = make_checkpoint("lora_bias_all", "gpt2")
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if name.endswith("bias"):
                path = name.removeprefix("base_model.model.").replace(".base_layer", "")
                parameter.copy_(base.model.get_parameter(path))
    adapter = compile_adapter(inspect(save(oracle), base, GateLimits()), base, GateLimits())
    kinds = {type(edit).__name__ for path, edit in adapter.sites.items() if path.endswith("c_fc")}
    assert not kinds
    assert all(edit.shift is None for path, edit in adapter.sites.items() if path.endswith("c_attn"))


def test_tasks_of_one_checkpoint_on_an_encoder_decoder() -> None:
    """As peft generates: the task's embeddings stand in front of the source, nothing in front of the decoder."""
    base = base_of("t5")
    files, oracle = make_checkpoint("multitask_prompt_tuning", "t5", seed=1)
    ids, _ = sample_ids()
    seen = []
    for task in range(3):
        inspected = inspect(files, base, GateLimits())
        asked = replace(inspected, config=Config({**inspected.config.fields, TASK_FIELD: task}))
        adapter = compile_adapter(asked, base, GateLimits())
        got = adapted_logits(base, adapter, ids, torch.tensor([[0]]))[0, -1]
        given = oracle.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            task_ids=torch.tensor([task]),
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        expected = given.logits[0][0]
        assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()
        seen.append(got)
    assert not torch.allclose(seen[0], seen[1], rtol=1e-4)
    assert not torch.allclose(seen[1], seen[2], rtol=1e-4)
