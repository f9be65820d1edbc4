"""Which family a transformers `model_type` belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from peft_serve.model.families.bart import Bart
from peft_serve.model.families.decoder_only import DecoderOnly
from peft_serve.model.families.encoder import Encoder
from peft_serve.model.families.family import Family
from peft_serve.model.families.own_attention import OwnAttention
from peft_serve.model.families.padded_encoder import PaddedEncoder
from peft_serve.model.families.t5 import T5

_DECODERS: Final = (
    *("llama", "smollm3", "mistral", "mixtral", "starcoder2", "stablelm", "granite", "granitemoe", "nemotron"),
    *("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gpt_oss", "gemma", "gemma2", "gemma3", "gemma3_text"),
    *("olmo", "olmo2", "olmo3", "olmoe", "cohere", "cohere2", "glm", "glm4", "exaone4", "helium", "persimmon"),
    *("gpt2", "gpt_bigcode", "gpt_neox", "opt", "biogpt", "phi", "phi3"),
)

_FAMILIES: Final[Mapping[str, Callable[[PreTrainedModel], Family]]] = MappingProxyType(
    {
        **dict.fromkeys(_DECODERS, DecoderOnly),
        **dict.fromkeys(("bloom", "falcon", "mpt", "gptj", "codegen", "gpt_neo"), OwnAttention),
        **dict.fromkeys(("t5", "mt5", "umt5"), T5),
        **dict.fromkeys(("bart", "mbart", "plbart", "blenderbot", "blenderbot-small"), Bart),
        **dict.fromkeys(("pegasus", "marian", "m2m_100"), Bart),
        **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra"), Encoder),
        "deberta-v2": PaddedEncoder,
    }
)


def is_known(model_type: str) -> bool:
    """Whether this kind of model is tested."""
    return model_type in _FAMILIES


def is_encoder_kind(model_type: str) -> bool:
    """Whether this kind of model is known as an encoder."""
    return _FAMILIES.get(model_type) in (Encoder, PaddedEncoder)


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration reads in both directions and has no decoder.

    Of a kind that is not known, one that fills masks: whether it can be served is for the self-check to say.
    """
    if config.is_encoder_decoder or getattr(config, "is_decoder", False):
        return False
    if is_known(config.model_type):
        return is_encoder_kind(config.model_type)
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING


def family_of(model: PreTrainedModel) -> Family:
    """The family of a model; for an unknown one the family it looks like, to be proved by the self-check.

    ValueError for a model whose rows can never stand side by side.
    """
    if getattr(model.config, "expert_capacity", None):
        raise ValueError("its experts have a capacity, so which tokens they drop depends on the requests of a batch")
    like: Callable[[PreTrainedModel], Family]
    if is_encoder(model.config):
        like = PaddedEncoder if _FAMILIES.get(model.config.model_type) is PaddedEncoder else Encoder
    elif is_known(model.config.model_type):
        like = _FAMILIES[model.config.model_type]
    elif not model.config.is_encoder_decoder:
        like = DecoderOnly
    elif hasattr(model.config, "relative_attention_max_distance"):
        like = T5
    else:
        like = Bart
    return like(model)
