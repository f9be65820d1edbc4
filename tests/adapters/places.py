"""Where tiny bases of each kind keep the modules that adapters act on."""

from __future__ import annotations

from typing import Final

QKV: Final = {
    "phi": ["q_proj", "v_proj", "fc2"],
    "bloom": ["query_key_value", "dense"],
    "gpt2": ["c_attn", "c_proj"],
    "mixtral": ["q_proj", "v_proj", "o_proj"],
    "gpt_oss": ["q_proj", "v_proj", "o_proj"],
    "neox": ["query_key_value", "dense"],
    "t5": ["q", "v", "wo"],
    "opt": ["q_proj", "v_proj", "fc2"],
    "bart": ["q_proj", "v_proj", "fc2"],
    "bart_scaled": ["q_proj", "v_proj", "fc2"],
}
NORMS: Final = {
    "phi": ["input_layernorm", "final_layernorm"],
    "bloom": ["input_layernorm", "ln_f"],
    "gpt2": ["ln_1", "ln_f"],
    "neox": ["input_layernorm", "final_layer_norm"],
    "t5": ["layer_norm"],
    "opt": ["self_attn_layer_norm", "final_layer_norm"],
    "bart": ["self_attn_layer_norm", "layernorm_embedding"],
    "bart_scaled": ["self_attn_layer_norm", "layernorm_embedding"],
    "gemma": ["input_layernorm", "q_norm"],
}
EMBED: Final = {"bloom": "word_embeddings", "gpt2": "wte", "neox": "embed_in"}
HEAD: Final = {"neox": "embed_out"}
FEED_FORWARD: Final = {"bloom": "dense_4h_to_h", "gpt2": "mlp.c_proj", "neox": "dense_4h_to_h", "t5": "wo"}


def targets(kind: str) -> list[str]:
    return QKV.get(kind, ["q_proj", "v_proj", "down_proj"])


def norms(kind: str) -> list[str]:
    return NORMS.get(kind, ["input_layernorm", "norm"])


def embedding(kind: str) -> str:
    return EMBED.get(kind, "embed_tokens")


def head(kind: str) -> str:
    return HEAD.get(kind, "lm_head")


def feed_forward(kind: str) -> str:
    """The last projection of the feed-forward block."""
    return FEED_FORWARD.get(kind, "fc2" if "fc2" in targets(kind) else "down_proj")
