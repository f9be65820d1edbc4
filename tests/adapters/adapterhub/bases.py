"""Tiny bases whose weights follow from the names of their parameters, the same in every version of transformers."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from typing import Any, Final

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCAB: Final = 40
HIDDEN: Final = 16
NUM_TOKENS: Final = 9
NUM_NEW: Final = 8
NO_SPECIALS: Final[dict[str, Any]] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}


def _sizes(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        **more,
    }


def _t5(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "d_model": HIDDEN,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 0,
        **NO_SPECIALS,
        **more,
    }


def _config(family: str) -> Any:
    configs: dict[str, Callable[[], Any]] = {
        "bert": lambda: transformers.BertConfig(**_sizes()),
        "roberta": lambda: transformers.RobertaConfig(**_sizes()),
        "xlm-roberta": lambda: transformers.XLMRobertaConfig(**_sizes()),
        "deberta-v2": lambda: transformers.DebertaV2Config(
            **_sizes(
                relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm"
            )
        ),
        "electra": lambda: transformers.ElectraConfig(**_sizes(embedding_size=8)),
        "distilbert": lambda: transformers.DistilBertConfig(
            vocab_size=VOCAB, dim=HIDDEN, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=64
        ),
        "llama": lambda: transformers.LlamaConfig(**_sizes(num_key_value_heads=1, **NO_SPECIALS)),
        "mistral": lambda: transformers.MistralConfig(**_sizes(num_key_value_heads=1, **NO_SPECIALS)),
        "mistral-window": lambda: transformers.MistralConfig(
            **_sizes(num_key_value_heads=1, sliding_window=4, **NO_SPECIALS)
        ),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=2, n_inner=24, n_positions=64, **NO_SPECIALS
        ),
        "t5": lambda: transformers.T5Config(**_t5()),
        "t5-gated": lambda: transformers.T5Config(**_t5(feed_forward_proj="gated-gelu")),
        "mt5": lambda: transformers.MT5Config(**_t5()),
        "bart": lambda: transformers.BartConfig(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=64,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
            **NO_SPECIALS,
        ),
    }
    return configs[family]()


CLASSES: Final[dict[str, str]] = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "deberta-v2": "DebertaV2Model",
    "electra": "ElectraModel",
    "distilbert": "DistilBertModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mistral-window": "MistralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "t5": "T5ForConditionalGeneration",
    "t5-gated": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
}
FAMILIES: Final = tuple(CLASSES)
ENCODERS: Final = ("bert", "roberta", "xlm-roberta", "deberta-v2", "electra", "distilbert")
SEQ2SEQ: Final = ("t5", "t5-gated", "mt5", "bart")


def seeded(name: str, tensor: Tensor, *, scale: float, about: float = 0.0) -> Tensor:
    """Values that follow from a name alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return about + scale * torch.randn(tensor.shape, generator=generator)


def set_weights(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = parameter.dim() == 1 and name.endswith("weight")
            about, scale = (1.0, 0.2) if is_gain else (0.0, 0.1 if parameter.dim() == 1 else 0.3)
            parameter.copy_(seeded(_told_apart(name, model.config.model_type), parameter, scale=scale, about=about))


def _told_apart(name: str, model_type: str) -> str:
    """One tensor that several modules share has one name in one version, and three in another."""
    if model_type == "mt5" and name == "lm_head.weight":  # shared in one version, and its own in the other
        return "shared.weight"
    return re.sub(r"(encoder|decoder)\.embed_tokens", "shared", name)


def config_of(family: str) -> Any:
    config = _config(family)
    config._attn_implementation = "eager"
    return config


def base_model(family: str) -> PreTrainedModel:
    """The base of a family in eval mode, frozen."""
    model: PreTrainedModel = getattr(transformers, CLASSES[family])(config_of(family))
    set_weights(model)
    return model.eval().requires_grad_(False)


def inputs(family: str) -> dict[str, Tensor]:
    """One sequence of `NUM_TOKENS` ids; on an encoder-decoder, five ids for the decoder too."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(5, VOCAB, (1, NUM_TOKENS), generator=generator)
    decoder_ids = torch.randint(5, VOCAB, (1, 5), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": decoder_ids} if family in SEQ2SEQ else {"input_ids": ids}


def answer(family: str, out: Any) -> Tensor:
    """What is compared: last hidden states [T, d] of an encoder, else logits [T, V]."""
    result: Tensor = out.last_hidden_state[0] if family in ENCODERS else out.logits[0]
    return result
