"""Which family a transformers `model_type` belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from transformers import PreTrainedModel

from peft_serve.model.families.bart import Bart
from peft_serve.model.families.decoder_only import DecoderOnly
from peft_serve.model.families.family import Family
from peft_serve.model.families.t5 import T5

_FAMILIES: Final[Mapping[str, Callable[[PreTrainedModel], Family]]] = MappingProxyType(
    {
        **dict.fromkeys(
            ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gpt2", "opt", "gpt_neox"), DecoderOnly
        ),
        **dict.fromkeys(("t5", "mt5", "umt5"), T5),
        **dict.fromkeys(("bart", "mbart"), Bart),
    }
)


def is_known(model_type: str) -> bool:
    """Whether this kind of model is tested."""
    return model_type in _FAMILIES


def family_of(model: PreTrainedModel) -> Family:
    """The family of a model; for an unknown one the family it looks like, to be proved by the self-check."""
    like: Callable[[PreTrainedModel], Family]
    if is_known(model.config.model_type):
        like = _FAMILIES[model.config.model_type]
    elif not model.config.is_encoder_decoder:
        like = DecoderOnly
    elif hasattr(model.config, "relative_attention_max_distance"):
        like = T5
    else:
        like = Bart
    return like(model)
