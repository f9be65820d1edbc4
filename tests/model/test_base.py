"""The resident base as adapters see it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import AttentionInterface

from peft_serve.adapters.base import HAS_WEIGHT, NoValues, SiteKind
from peft_serve.model.base import ResidentBase
from peft_serve.model.routing import Stream
from tests.model.tiny_models import EVERY, VOCAB, tiny


@pytest.mark.parametrize("name", EVERY)
def test_weights_are_out_by_in_whatever_the_module_stores(name: str) -> None:
    base = ResidentBase(tiny(name), name=name)
    assert base.sites
    for path, spec in base.sites.items():
        if spec.kind not in HAS_WEIGHT:
            continue
        weight = base.weight(path)
        assert weight.dtype is torch.float32
        if spec.kind is SiteKind.NORM:
            assert weight.shape == (spec.out_features,)
        else:
            assert weight.shape == (spec.out_features, spec.in_features)
        bias = base.bias(path)
        assert (bias is not None) == spec.has_bias
        assert bias is None or bias.shape == (spec.out_features,)


def test_an_outline_has_sites_and_says_that_it_has_no_values() -> None:
    base = ResidentBase(tiny("llama").to("meta"), name="tiny")
    path = next(path for path, spec in base.sites.items() if spec.kind is SiteKind.LINEAR)
    for ask in (base.weight, lambda path: base.parameter(path, "weight")):
        with pytest.raises(NoValues, match=path):
            ask(path)
    assert base.bias(path) is None  # which is known without its values


@pytest.mark.parametrize("name", EVERY)
def test_the_shape_is_that_of_the_cache_the_library_would_keep(name: str) -> None:
    model = tiny(name)
    tokens = torch.tensor([[5, 6, 7]])
    inputs = (
        {"input_ids": tokens, "decoder_input_ids": tokens} if model.config.is_encoder_decoder else {"input_ids": tokens}
    )
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    own = cache.self_attention_cache if model.config.is_encoder_decoder else cache
    shape = ResidentBase(model, name=name).shape
    assert own.layers[0].keys.shape == (1, shape.num_kv_heads, 3, shape.head_dim)
    assert len([layer for layer in own.layers if layer.keys is not None]) == shape.num_layers
    assert shape.vocab_size == VOCAB
    assert shape.hidden_size == model.get_input_embeddings().embedding_dim


@pytest.mark.parametrize(
    ("name", "path", "stream"),
    [
        ("llama", "lm_head", Stream.HEAD),
        ("llama", "model.embed_tokens", Stream.TARGET),
        ("gpt2", "transformer.h.0.attn.c_attn", Stream.TARGET),
        ("t5", "encoder.block.0.layer.0.SelfAttention.k", Stream.SOURCE),
        ("t5", "encoder.final_layer_norm", Stream.SOURCE),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.v", Stream.SOURCE),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.q", Stream.TARGET),
        ("t5", "decoder.block.1.layer.0.SelfAttention.v", Stream.TARGET),
        ("t5", "lm_head", Stream.HEAD),
        ("bart", "model.encoder.layers.0.fc1", Stream.SOURCE),
        ("bart", "model.decoder.layers.0.encoder_attn.k_proj", Stream.SOURCE),
        ("bart", "model.decoder.layers.0.encoder_attn.out_proj", Stream.TARGET),
        ("bart", "model.decoder.layers.0.self_attn.k_proj", Stream.TARGET),
        ("bart", "lm_head", Stream.HEAD),
    ],
)
def test_streams(name: str, path: str, stream: Stream) -> None:
    base = ResidentBase(tiny(name), name=name)
    assert path in base.sites
    assert base.runs.stream_of(path) is stream


@pytest.mark.parametrize("name", EVERY)
def test_only_the_output_embeddings_see_the_kept_positions(name: str) -> None:
    base = ResidentBase(tiny(name), name=name)
    modules = [p for p, spec in base.sites.items() if spec.kind in HAS_WEIGHT]
    heads = [p for p in modules if base.runs.stream_of(p) is Stream.HEAD]
    assert [base.model.get_submodule(p) for p in heads] == [base.model.get_output_embeddings()]


def test_tables_that_are_read_without_a_call_are_no_sites() -> None:
    for name in ("t5", "umt5", "bart", "mbart"):
        paths = ResidentBase(tiny(name), name=name).sites
        assert not [p for p in paths if p.endswith(("relative_attention_bias", "embed_positions"))]


def test_tied_weights_are_told() -> None:
    assert ResidentBase(tiny("gpt2"), name="gpt2").tied == (frozenset({"transformer.wte", "lm_head"}),)
    assert ResidentBase(tiny("llama"), name="llama").tied == ()
    (group,) = ResidentBase(tiny("t5"), name="t5").tied
    assert {"shared", "encoder.embed_tokens", "decoder.embed_tokens"} <= group


def test_a_generation_starts_and_ends_as_the_configuration_says() -> None:
    model = tiny("bart")
    model.generation_config.eos_token_id = [2, 9]
    model.generation_config.forced_bos_token_id = 11
    base = ResidentBase(model, name="bart")
    assert base.eos_ids == {2, 9}
    assert base.decoder_start_ids == (2,)
    assert base.forced_first == 11
    model.generation_config.eos_token_id = 3
    assert base.eos_ids == {3}
    causal = ResidentBase(tiny("llama"), name="llama")
    assert causal.eos_ids == frozenset()
    assert causal.decoder_start_ids == ()


def test_a_decoder_that_cannot_start_says_what_is_missing() -> None:
    model = tiny("bart")
    model.generation_config.decoder_start_token_id = None
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        _ = ResidentBase(model, name="bart").decoder_start_ids


def test_t5_has_no_hard_limit_of_positions_and_learned_tables_do() -> None:
    limits = {
        name: ResidentBase(tiny(name), name=name).runs.has_position_limit for name in ("t5", "bart", "gpt2", "llama")
    }
    assert limits == {"t5": False, "bart": True, "gpt2": True, "llama": False}
    assert ResidentBase(tiny("t5"), name="t5").shape.max_positions == 512


def test_two_bases_have_two_attentions_and_a_base_can_be_dropped() -> None:
    first, second = (ResidentBase(tiny("llama"), name=str(i)) for i in range(2))
    names = {base.model.config._attn_implementation for base in (first, second)}
    assert len(names) == 2
    assert names <= set(AttentionInterface().keys())
    gone = weakref.ref(first.runs.attention)
    del first
    gc.collect()
    assert gone() is None
