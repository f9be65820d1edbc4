"""The bytes of tokens, for each kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer

from peft_serve.grammars.spelling import Unspellable, spelling_of
from tests.grammars.vocabularies import byte_level, sentencepiece_bpe, spelled, unigram, word_pieces

TEXT = '{"name": 12, "a": true}'


@pytest.mark.parametrize(
    ("make", "text"),
    [(byte_level, TEXT + " é€𝄞\n"), (sentencepiece_bpe, TEXT + " é€𝄞\n"), (unigram, "some stones")],
)
def test_the_bytes_of_the_tokens_of_a_text_are_the_text(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = make()
    spelling = spelled(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(spelling.tokens[i] for i in ids).decode().removeprefix(" ") == text
    assert tokenizer.decode(ids) == text


def test_special_tokens_and_rows_without_a_token_stand_for_nothing() -> None:
    tokenizer = byte_level()
    size = tokenizer.get_vocab_size()
    spelling = spelling_of(tokenizer.to_str(), special=frozenset({40}), size=size + 2)
    assert [spelling.tokens[i] for i in (0, 1, 2, 40, size, size + 1)] == [b""] * 6
    assert spelling.tokens[tokenizer.token_to_id("<own word>")] == b"<own word>"
    assert len(spelling_of(tokenizer.to_str(), special=frozenset(), size=5).tokens) == 5


def test_whether_the_first_space_is_shown_is_the_decoders_say() -> None:
    assert not spelled(byte_level()).drops_first_space
    for make in (sentencepiece_bpe, unigram):
        tokenizer = make()
        assert spelled(tokenizer).drops_first_space
        assert tokenizer.decode(tokenizer.encode("a").ids) == "a"


def test_a_tokenizer_whose_tokens_are_no_bytes_is_refused() -> None:
    with pytest.raises(Unspellable, match="WordPiece"):
        spelled(word_pieces())
