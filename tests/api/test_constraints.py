"""Which vocabulary a grammar is put over: the base's, or that of an adapter with tokens of its own."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from peft_serve.adapters.vocabulary import Vocabulary
from peft_serve.api.constraints import Constraints
from peft_serve.api.forms import Form
from peft_serve.errors import InvalidParameter
from peft_serve.grammars.compiler import GrammarCompiler
from peft_serve.grammars.grammar import of_choice, of_regex
from peft_serve.text import TextCodec

VOCAB_SIZE = 300
EOS = frozenset({1})


def ids_in(mask: bytes) -> set[int]:
    return {i for i in range(len(mask) * 8) if mask[i // 8] >> (i % 8) & 1}


@pytest.fixture
def constraints() -> Constraints:
    return Constraints(GrammarCompiler(), vocab_size=VOCAB_SIZE, max_bytes=1000)


async def test_an_adapters_own_tokens_may_be_said_by_its_answers_only(
    tiny_tokenizer: Any, constraints: Constraints
) -> None:
    base = TextCodec(tiny_tokenizer, is_encoder_decoder=False)
    first = len(tiny_tokenizer)
    vocabulary = Vocabulary(added={"<call>": first, "<end>": first + 1}, special=frozenset({"<end>"}))
    own = base.speaking(vocabulary, vocab_size=VOCAB_SIZE, with_template=False)
    form = Form(of_choice(["<call>"]), "regex")
    by_base = (await constraints.of(form, base, EOS)).start().mask()
    by_own = (await constraints.of(form, own, EOS)).start().mask()
    (less,) = tiny_tokenizer.encode("<", add_special_tokens=False)
    assert ids_in(by_base) == {less}
    assert ids_in(by_own) == {less, first}
    never = (await constraints.of(Form(of_regex("<(call|end)>"), "regex"), own, EOS)).start()
    assert ids_in(never.mask()) == {less, first}


async def test_a_codec_that_is_forgotten_is_not_kept_alive(tiny_tokenizer: Any, constraints: Constraints) -> None:
    codec = TextCodec(tiny_tokenizer, is_encoder_decoder=False)
    await constraints.of(Form(of_regex("a"), "regex"), codec, EOS)
    assert len(constraints._keys) == 1
    del codec
    for _ in range(500):  # the thread that compiled lets go a moment after it has answered
        gc.collect()
        if not constraints._keys:
            break
        await asyncio.sleep(0.01)
    assert len(constraints._keys) == 0


async def test_a_grammar_that_is_too_long_is_refused_before_it_is_read(
    tiny_tokenizer: Any, constraints: Constraints
) -> None:
    codec = TextCodec(tiny_tokenizer, is_encoder_decoder=False)
    with pytest.raises(InvalidParameter, match=r"parameters.regex: \d+ bytes.*at most 1000") as refused:
        await constraints.of(Form(of_regex("a" * 2000), "parameters.regex"), codec, EOS)
    assert refused.value.param == "regex"
