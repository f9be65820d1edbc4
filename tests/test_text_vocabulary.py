"""A codec that speaks an adapter's own tokens: what it adds, what it refuses, and what stays the base's."""

from __future__ import annotations

from typing import Any

import pytest

from peft_serve.adapters.vocabulary import Vocabulary
from peft_serve.errors import AdapterInvalid
from peft_serve.text import TextCodec

ROWS = 270  # of the embedding; the tokenizer has 261 words


@pytest.fixture(scope="module")
def codec(tiny_tokenizer: Any) -> TextCodec:
    return TextCodec(tiny_tokenizer, is_encoder_decoder=False)


def speaking(codec: TextCodec, *, with_template: bool = False, **said: Any) -> TextCodec:
    return codec.speaking(Vocabulary(**said), vocab_size=ROWS, with_template=with_template)


def test_new_tokens_are_read_and_written_and_the_base_does_not_know_them(codec: TextCodec) -> None:
    before = codec.encode("a<call>b<end>")
    own = speaking(codec, added={"<end>": 262, "<call>": 261, "</s>": 1}, special=frozenset({"<end>", "</s>"}))
    a, b = codec.encode("a")[0], codec.encode("b")[0]
    assert own.encode("a<call>b<end>") == (a, 261, b, 262)
    assert own.decode([a, 261, b, 262]) == "a<call>b", "a special token is left out"
    assert own.decode([a, 262], skip_special_tokens=False) == "a<end>"
    assert (own.is_special(261), own.is_special(262), own.is_special(1)) == (False, True, True)
    assert own.token_text(262) == "<end>"
    assert own.continuations("a").ids("<call>") == own.encode(" <call>")
    detokenizer = own.detokenizer(own.encode("a"))
    assert [detokenizer.push(i) for i in (261, 262, b)] == ["<call>", "", "b"]
    assert own.encode_fully("a<call>").ids == (a, 261)
    assert codec.encode("a<call>b<end>") == before, "the base's own is untouched"
    assert len(before) > 4
    assert not codec.is_special(262)


def test_flags_of_a_token_count(codec: TextCodec) -> None:
    own = speaking(codec, added={"<x>": 261}, traits={"<x>": ("lstrip",)})
    assert own.encode("a <x>") == (codec.encode("a")[0], 261), "it takes the space before it"


def test_the_end_of_sequence_that_an_adapter_adds_ends_its_answers(codec: TextCodec) -> None:
    own = speaking(codec, added={"<end>": 261}, names={"eos_token": "<end>"})
    assert own.own_eos_ids == {261}
    assert own.template_words["eos_token"] == "<end>"
    assert own.template_words["bos_token"] == "<s>", "the base's where the adapter says nothing"
    assert not speaking(codec, added={"<x>": 261}, names={"eos_token": "</s>"}).own_eos_ids


def test_what_the_base_has_is_nothing_new(codec: TextCodec) -> None:
    assert speaking(codec) is codec
    assert speaking(codec, added={"</s>": 1, "<pad>": 0}, names={"eos_token": "</s>"}) is codec
    assert speaking(codec, chat_template="{{ messages }}") is codec, "not wanted"


def test_a_template_shares_the_tokenizer_and_is_not_run_here(codec: TextCodec) -> None:
    own = speaking(codec, chat_template="{{ messages }}", with_template=True)
    assert own.own_template == "{{ messages }}"
    assert own.has_chat_template
    assert not codec.has_chat_template
    assert own.encode("abc") == codec.encode("abc")
    with pytest.raises(AssertionError):
        own.chat_prompt([{"role": "user", "content": "hi"}])


def test_the_bases_own_template_is_no_news(tiny_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "T"
    codec = TextCodec(tokenizer, is_encoder_decoder=False)
    assert speaking(codec, chat_template="T", with_template=True) is codec
    assert codec.fingerprint() != TextCodec(tiny_tokenizer, is_encoder_decoder=False).fingerprint()


@pytest.mark.parametrize(
    ("added", "token", "reason"),
    [
        ({"</s>": 7}, "</s>", "base's tokenizer has it as 1"),
        ({"<x>": 1}, "<x>", "is '</s>' in the base's tokenizer"),
        ({"<x>": 262}, "<x>", "where 261 is due"),
        ({"<x>": 261, "<y>": 263}, "<y>", "without a gap"),
        ({"<x>": 261, "<y>": 261}, "<y>", "where 262 is due"),
        ({f"<{i}>": 261 + i for i in range(10)}, "<9>", "270 rows; resize the base"),
    ],
)
def test_refused_by_name(codec: TextCodec, added: dict[str, int], token: str, reason: str) -> None:
    with pytest.raises(AdapterInvalid) as refused:
        speaking(codec, added=added)
    assert len(refused.value.errors) == 1
    assert repr(token) in refused.value.errors[0].path
    assert reason in refused.value.errors[0].reason


def test_many_new_tokens_are_added_at_once(codec: TextCodec) -> None:
    added = {f"<{i}>": 261 + i for i in range(4096)}
    own = codec.speaking(Vocabulary(added=added), vocab_size=10_000, with_template=False)
    assert own.encode("<0><4095>") == (261, 261 + 4095)
