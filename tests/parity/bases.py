"""Tiny bases on disk with a tokenizer whose words are the token ids, so that a text is exactly its ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.adapters.checkpoints import VOCAB, make_base
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def words(ids: list[int]) -> str:
    """The text of these ids."""
    return " ".join(f"t{i}" for i in ids)


def save_tiny_base(base_kind: str, folder: Path) -> Any:
    """Write the base to `folder` as a served model; gives the model itself, the oracle's base."""
    model = make_base(base_kind)
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 0
    if model.config.is_encoder_decoder and model.generation_config.decoder_start_token_id is None:
        model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="t0", eos_token="t1", unk_token="t2", bos_token="t3"
    ).save_pretrained(folder)
    return model
