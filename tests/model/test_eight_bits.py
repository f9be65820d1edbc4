"""Bases in 8 bits: which layers are stored so, what stays, and that each family is served from them as it is."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from peft_serve.adapters.primitives import Adapter, Affine, LowRank
from peft_serve.core import BASE, AdapterId
from peft_serve.kernels.eight_bits import Code, Coded
from peft_serve.model.base import ResidentBase
from peft_serve.model.eight_bits import EightBitLinear, eight_bit_layers, store_in_eight_bits
from peft_serve.model.loader import NotServable, load_base, wrap
from peft_serve.model.quantised import num_parameters
from tests.model.driver import Driver, random_jobs
from tests.model.tiny_encoders import tiny_encoder
from tests.model.tiny_models import VOCAB, tiny

CPU = torch.device("cpu")


def stored(model: PreTrainedModel, code: Code = Code.INT8) -> PreTrainedModel:
    store_in_eight_bits(model, code, CPU)
    return model


def decoded(model: PreTrainedModel) -> PreTrainedModel:
    """The plain model that one in 8 bits stands for."""
    for path, layer in [(path, m) for path, m in model.named_modules() if isinstance(m, EightBitLinear)]:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight = nn.Parameter(layer.matrix(), requires_grad=False)
        if layer.bias is not None:
            plain.bias = layer.bias
        model.set_submodule(path, plain)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "t5", "bart", "gpt_neox", "qwen2"])
def test_the_body_is_stored_in_8_bits_and_the_rest_is_not(family: str) -> None:
    plain = tiny(family)
    num = num_parameters(plain)
    model = stored(tiny(family))
    layers = list(eight_bit_layers(model))
    linear = [m for m in plain.modules() if isinstance(m, nn.Linear) and m.out_features >= 16]
    head = plain.get_output_embeddings()
    assert len(layers) == len([m for m in linear if m is not head])
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    assert not isinstance(model.get_output_embeddings(), EightBitLinear)
    assert model.dtype is torch.float32
    assert num_parameters(model) == num
    assert all(layer.weight.dtype is torch.int8 and not layer.training for layer in layers)


@pytest.mark.parametrize("code", list(Code))
@pytest.mark.parametrize("family", ["llama", "t5-gated", "gpt_neox"])
def test_rows_with_adapters_meet_the_weights_that_8_bits_stand_for(family: str, code: Code) -> None:
    path = next(
        path
        for path, m in tiny(family).named_modules()
        if type(m) is nn.Linear and "lm_head" not in path and "embed_out" not in path
    )
    made, outputs = torch.Generator().manual_seed(1), []
    for model in (stored(tiny(family), code), decoded(stored(tiny(family), code))):
        base = wrap(model, name=family)
        spec = base.sites[path]
        made.manual_seed(1)
        a_RI, b_OR = (torch.randn(size, generator=made) for size in ((3, spec.in_features), (spec.out_features, 3)))
        one = Adapter(
            id=AdapterId("sha256:one"), method="LORA", sites={path: Affine(delta=LowRank(0.3 * a_RI, 0.3 * b_OR))}
        )
        driver = Driver(base, {one.id: one}, seed=1)
        driver.install(one.id)
        jobs = random_jobs(
            random.Random(2),
            count=4,
            vocab=VOCAB,
            start=base.decoder_start_ids,
            has_source=base.shape.is_encoder_decoder,
            adapter=lambda i, one=one: one.id if i % 2 else BASE,  # type: ignore[misc]
        )
        driver.finish(jobs)
        outputs.append(([job.output for job in jobs], [job.logprobs for job in jobs]))
    assert outputs[0][0] == outputs[1][0]
    for ours, own in zip(outputs[0][1], outputs[1][1], strict=True):
        assert ours == pytest.approx(own, abs=2e-4)


def test_an_encoder_is_stored_too() -> None:
    model = stored(tiny_encoder("bert"))
    assert len(list(eight_bit_layers(model))) >= 12
    wrap(model, name="bert")  # which checks it against itself


def test_the_fingerprint_tells_how_a_base_is_stored() -> None:
    prints = {
        ResidentBase(model, name="x").fingerprint()
        for model in (tiny("llama"), stored(tiny("llama")), stored(tiny("llama"), Code.FP8))
    }
    assert len(prints) == 3
    model = stored(tiny("llama"))
    base, before = ResidentBase(model, name="x"), ResidentBase(stored(tiny("llama")), name="x").fingerprint()
    assert base.fingerprint() == before
    next(eight_bit_layers(model)).steps[0] *= 2
    assert base.fingerprint() != before


def test_a_weight_that_two_layers_share_stays() -> None:
    model = tiny("llama")
    first, second = (layer.self_attn.q_proj for layer in model.model.layers[:2])
    second.weight = first.weight
    store_in_eight_bits(model, Code.INT8, CPU)
    first, second = (layer.self_attn.q_proj for layer in model.model.layers[:2])
    assert type(first) is type(second) is nn.Linear
    assert first.weight is second.weight


def test_what_has_nothing_to_store_or_cannot_be_is_refused(tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(NotServable, match=r"'gpt2' has no linear layers that can be stored in 8 bits; leave --quant"):
        load_base(str(tmp_path / "gpt2"), device="cpu", quantisation="int8")
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "llama")
    with pytest.raises(NotServable, match=r"weight of model.layers.1.mlp.up_proj cannot be stored in 8 bits.*finite"):
        load_base(str(tmp_path / "llama"), device="cpu", quantisation="fp8")


class Counting:
    """A kernel that counts its calls."""

    def __init__(self) -> None:
        self.num_calls = 0

    def multiply(self, x: Tensor, weight: Coded, bias_O: Tensor | None) -> Tensor:
        self.num_calls += 1
        return x.new_zeros(*x.shape[:-1], weight.num_out)


def test_a_kernel_is_asked_once_it_is_given() -> None:
    model, kernel = stored(tiny("llama")), Counting()
    layers = list(eight_bit_layers(model))
    base = ResidentBase(model, name="x")  # sites are bound before the kernel comes
    for layer in layers:
        layer.run_by(kernel)
    driver = Driver(base, seed=1)
    driver.finish(random_jobs(random.Random(1), count=1, vocab=VOCAB))
    assert kernel.num_calls >= len(layers)
