"""Tiny random models of every family, with weights large enough that greedy tokens do not tie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

VOCAB = 97
NO_SPECIALS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}


def causal_sizes(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        **NO_SPECIALS,
        **more,
    }


def t5_sizes(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "d_model": 32,
        "d_ff": 64,
        "d_kv": 12,  # not d_model / num_heads
        "num_layers": 3,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,  # short, so that tests reach it
        "decoder_start_token_id": 0,
        **NO_SPECIALS,
        **more,
    }


def bart_sizes(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 128,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
        "scale_embedding": True,
        **NO_SPECIALS,
        **more,
    }


CAUSAL: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**causal_sizes(intermediate_size=48, num_key_value_heads=2))),
    "llama-mha": lambda: LlamaForCausalLM(LlamaConfig(**causal_sizes(intermediate_size=48, head_dim=12))),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**causal_sizes(intermediate_size=48, num_key_value_heads=1))),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**causal_sizes(intermediate_size=48, num_key_value_heads=2, head_dim=12))
    ),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**causal_sizes(intermediate_size=48, num_key_value_heads=2, sliding_window=6))
    ),
    "gemma": lambda: GemmaForCausalLM(
        GemmaConfig(**causal_sizes(intermediate_size=48, num_key_value_heads=1, head_dim=16))
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **causal_sizes(intermediate_size=48, num_key_value_heads=2, head_dim=16, sliding_window=5),
            attn_logit_softcapping=5.0,
            final_logit_softcapping=8.0,
            query_pre_attn_scalar=16,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**causal_sizes(scale_attn_by_inverse_layer_idx=True))),
    "opt": lambda: OPTForCausalLM(OPTConfig(**causal_sizes(ffn_dim=64, word_embed_proj_dim=16))),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**causal_sizes(intermediate_size=64))),
}

SEQ2SEQ: dict[str, Callable[[], PreTrainedModel]] = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**t5_sizes())),
    "t5-gated": lambda: T5ForConditionalGeneration(
        T5Config(**t5_sizes(feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    ),
    "mt5": lambda: MT5ForConditionalGeneration(MT5Config(**t5_sizes())),
    "umt5": lambda: UMT5ForConditionalGeneration(UMT5Config(**t5_sizes())),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**bart_sizes())),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**bart_sizes())),
}

EVERY = {**CAUSAL, **SEQ2SEQ}


def tiny(name: str, seed: int = 0) -> PreTrainedModel:
    """A model in eval mode with its own eager attention; the same weights for the same seed."""
    return randomised(EVERY[name], seed)


def randomised(make: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    """A model of which every weight is drawn anew."""
    torch.manual_seed(seed)
    model = make()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation != "eager":
            if getattr(module.config, "alibi", False):  # Falcon's own eager attention adds its slopes twice
                continue
            module.set_attn_implementation("eager")
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            is_gain = parameter.dim() == 1 and path.endswith("weight")
            parameter.normal_(1.0 if is_gain else 0.0, 0.25 if is_gain else 0.3)
        for path, buffer in model.named_buffers():
            if path == "final_logits_bias":
                buffer.normal_(0.0, 1.0)
    return model.eval().requires_grad_(False)
