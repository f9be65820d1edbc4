"""Tiny random models of more kinds: what is known to be served and is not in `tiny_models`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedModel

from tests.model.tiny_models import NO_SPECIALS, VOCAB, bart_sizes, causal_sizes, randomised, t5_sizes

_WINDOWED: dict[str, Any] = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
_PLAIN_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
_GPT: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, **NO_SPECIALS}
_MPT: dict[str, Any] = {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "max_seq_len": 128, **NO_SPECIALS}
_GPT_NEO: dict[str, Any] = {"attention_types": [[["global", "local"], 1]], "window_size": 6}


def _llama_like(kind: str, **more: Any) -> Callable[[], PreTrainedModel]:
    """A model of the class `<kind>ForCausalLM`, sized like the others."""
    sizes = {"intermediate_size": 48, "num_key_value_heads": 2, **more}
    return _causal(kind, **causal_sizes(**sizes))


def _causal(kind: str, **config: Any) -> Callable[[], PreTrainedModel]:
    return _of(f"{kind}Config", f"{kind}ForCausalLM", config)


def _of(config_class: str, model_class: str, config: dict[str, Any]) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        model: PreTrainedModel = getattr(transformers, model_class)(getattr(transformers, config_class)(**config))
        return model

    return make


def _seq2seq(kind: str, **more: Any) -> Callable[[], PreTrainedModel]:
    return _of(f"{kind}Config", f"{kind}ForConditionalGeneration", bart_sizes(**more))


def _with_eyes() -> PreTrainedModel:
    """A Gemma 3 that can look at pictures, which nobody shows it."""
    text = transformers.Gemma3TextConfig(**causal_sizes(intermediate_size=48, head_dim=8, **_WINDOWED))
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    ids = {"image_token_index": 2, "boi_token_index": 3, "eoi_token_index": 4}
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, **ids)
    )


MORE_CAUSAL: dict[str, Callable[[], PreTrainedModel]] = {
    "phi": _causal("Phi", **causal_sizes(intermediate_size=48, partial_rotary_factor=0.5)),
    "phi3": _llama_like("Phi3", sliding_window=6),
    "smollm3": _llama_like("SmolLM3", no_rope_layers=[1, 0]),
    "stablelm": _llama_like("StableLm", use_qkv_bias=True, qk_layernorm=True),
    "stablelm-parallel": _llama_like("StableLm", use_parallel_residual=True),
    "starcoder2": _llama_like("Starcoder2", sliding_window=6),
    "granite": _llama_like(
        "Granite", embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.3, logits_scaling=2.0
    ),
    "nemotron": _llama_like("Nemotron"),
    "helium": _llama_like("Helium", head_dim=8),
    "persimmon": _causal("Persimmon", **causal_sizes(intermediate_size=48)),
    "olmo": _llama_like("Olmo", clip_qkv=1.5),
    "olmo2": _llama_like("Olmo2"),
    "olmo3": _llama_like("Olmo3", **_WINDOWED),
    "cohere": _llama_like("Cohere", use_qk_norm=True),
    "cohere2": _llama_like("Cohere2", **_WINDOWED),
    "glm": _llama_like("Glm", head_dim=8),
    "glm4": _llama_like("Glm4", head_dim=8),
    "exaone4": _llama_like("Exaone4", **_WINDOWED),
    "gemma3_text": _of("Gemma3TextConfig", "Gemma3ForCausalLM", causal_sizes(intermediate_size=48, **_WINDOWED)),
    "gemma3": _with_eyes,
    "qwen2_moe": _llama_like(
        "Qwen2Moe", moe_intermediate_size=24, shared_expert_intermediate_size=24, mlp_only_layers=[0], **_EXPERTS
    ),
    "qwen3_moe": _llama_like("Qwen3Moe", moe_intermediate_size=24, head_dim=12, **_EXPERTS),
    "mixtral": _llama_like("Mixtral", num_local_experts=4, sliding_window=6),
    "olmoe": _llama_like("Olmoe", **_EXPERTS),
    "gpt_oss": _llama_like(
        "GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=6, rope_parameters=_PLAIN_ROPE
    ),
    "granitemoe": _llama_like("GraniteMoe", num_local_experts=4),
    "biogpt": _causal("BioGpt", **causal_sizes(intermediate_size=48)),
    "gpt_bigcode": _causal("GPTBigCode", **_GPT),
    "gpt_bigcode-mha": _causal("GPTBigCode", **_GPT, multi_query=False),
    "gptj": _causal("GPTJ", **_GPT, rotary_dim=4),
    "codegen": _causal("CodeGen", **_GPT, rotary_dim=4),
    "gpt_neo": _causal("GPTNeo", **causal_sizes(num_layers=2, num_heads=4, **_GPT_NEO)),
    "bloom": _causal("Bloom", vocab_size=VOCAB, hidden_size=48, n_layer=2, n_head=6, **NO_SPECIALS),
    "falcon": _causal("Falcon", **causal_sizes(bias=True)),
    "falcon-grouped": _causal("Falcon", **causal_sizes(new_decoder_architecture=True, num_kv_heads=2)),
    "falcon-slopes": _causal("Falcon", **causal_sizes(alibi=True, multi_query=False, parallel_attn=False)),
    "mpt": _causal("Mpt", **_MPT, n_heads=4, attn_config={"clip_qkv": 1.5}),
}

MORE_SEQ2SEQ: dict[str, Callable[[], PreTrainedModel]] = {
    "mt5-flan": _of(
        "MT5Config",
        "MT5ForConditionalGeneration",
        t5_sizes(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "pegasus": _seq2seq("Pegasus"),
    "marian": _of("MarianConfig", "MarianMTModel", bart_sizes()),
    "m2m_100": _seq2seq("M2M100", pad_token_id=1),
    "blenderbot": _seq2seq("Blenderbot"),
    "blenderbot-small": _seq2seq("BlenderbotSmall"),
    "plbart": _seq2seq("PLBart"),
}

MORE = {**MORE_CAUSAL, **MORE_SEQ2SEQ}


def tiny_more(name: str, seed: int = 0) -> PreTrainedModel:
    """A model in eval mode with an attention of its own; the same weights for the same seed."""
    return randomised(MORE[name], seed)
