"""Tiny bases on disk with a tokenizer whose words are the token ids, so that a text is exactly its ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from peft_serve.text import TextCodec
from tests.adapters.checkpoints import VOCAB, make_base


def words(ids: list[int]) -> str:
    """The text of these ids."""
    return " ".join(f"t{i:02}" for i in ids)


def word_codec(*, is_encoder_decoder: bool) -> TextCodec:
    """Encodes such texts and decodes to them."""
    return TextCodec(_tokenizer(), is_encoder_decoder=is_encoder_decoder)


def _tokenizer() -> Any:
    tokenizer = Tokenizer(models.WordLevel({f"t{i:02}": i for i in range(VOCAB)}, unk_token="t02"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="t00", eos_token="t01", unk_token="t02", bos_token="t03"
    )


def lively_base(base_kind: str) -> PreTrainedModel:
    """The base of this kind with larger weights, so that what an adapter does shows in the tokens."""
    return enliven(make_base(base_kind), seed=7)


def enliven(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The model with larger random weights."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def save_tiny_base(base_kind: str, folder: Path) -> None:
    """Write `lively_base` to `folder`, as a model that can be served."""
    save_base(lively_base(base_kind), folder)


def save_base(model: PreTrainedModel, folder: Path) -> None:
    """Write a model to `folder`, with a tokenizer and what ends a sequence."""
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 0
    if model.config.is_encoder_decoder and model.generation_config.decoder_start_token_id is None:
        model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
