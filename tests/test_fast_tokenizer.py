"""What goes to the `tokenizers` library directly is what transformers would have answered."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from peft_serve.fast_tokenizer import SHORT_CHARS, decoder_of, encoder_of

TEXTS = ["", "a", "Where is my order? ", "é€ 🙂 </s> x", "long words " * SHORT_CHARS]


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    """One that puts special tokens around a text."""
    own = copy.deepcopy(tiny_tokenizer)
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 3), ("</s>", 1)]
    )
    return own


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [True, False])
def test_ids_are_those_of_transformers(tokenizer: Any, text: str, special: bool) -> None:
    want = copy.deepcopy(tokenizer)(text, add_special_tokens=special)["input_ids"]
    assert encoder_of(tokenizer)(text, special) == want
    assert (3 in want) is special


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("skip", [True, False])
def test_text_is_that_of_transformers(tokenizer: Any, text: str, skip: bool) -> None:
    ids = tokenizer(text)["input_ids"]
    want = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert decoder_of(tokenizer)(ids, skip) == want
    assert decoder_of(tokenizer)([], skip) == ""


def test_a_truncation_of_the_file_is_off(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert len(encoder_of(tokenizer)("a" * 20, False)) == 20


class Shouting(PreTrainedTokenizerFast):
    """A tokenizer with ways of its own."""

    def _encode_plus(self, text: Any, *arguments: Any, **options: Any) -> Any:
        return super()._encode_plus(text.upper(), *arguments, **options)

    def _decode(self, *arguments: Any, **options: Any) -> str:
        return super()._decode(*arguments, **options).lower()


class Translating(PreTrainedTokenizerFast):
    """One that is told a language before each call."""

    def _switch_to_input_mode(self) -> None:
        self.backend_tokenizer.post_processor = TemplateProcessing(single="<sep> $A", special_tokens=[("<sep>", 4)])


def test_a_way_of_its_own_is_gone(tokenizer: Any) -> None:
    shouting = Shouting(tokenizer_object=tokenizer.backend_tokenizer)
    ids = encoder_of(shouting)("abc", False)
    assert ids == encoder_of(tokenizer)("ABC", False)
    assert decoder_of(tokenizer)(ids, True) == "ABC"
    assert decoder_of(shouting)(ids, True) == "abc"


def test_a_mode_is_switched_on_by_the_call(tokenizer: Any) -> None:
    translating = Translating(tokenizer_object=tokenizer.backend_tokenizer)
    assert encoder_of(translating)("abc", True)[0] == 4
