"""What is told of a text's length without tokenising it: never more tokens than it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_serve.text import TextCodec
from tests.conftest import make_tiny_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def wrapped(tokenizer: Tokenizer, **names: str) -> TextCodec:
    return TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names), is_encoder_decoder=False)


def demo() -> TextCodec:
    return TextCodec(make_tiny_tokenizer(), is_encoder_decoder=False)


def byte_level(normalizer: Any = None) -> TextCodec:
    """Bytes, and the merges of runs of spaces and of `the`."""
    merges = [("\u0120", "\u0120"), ("\u0120\u0120", "\u0120\u0120"), ("t", "h"), ("th", "e")]
    vocab = {piece: i for i, piece in enumerate([*LETTERS, *("".join(pair) for pair in merges)])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if normalizer is not None:
        made.normalizer = normalizer
    return wrapped(made)


def byte_fallback() -> TextCodec:
    """As Llama's first ones."""
    merges = [("\u2581", "a"), ("\u2581a", "a")]
    vocab = {piece: i for i, piece in enumerate(["<unk>", *BYTES, "\u2581", "a", "\u2581a", "\u2581aa"])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return wrapped(made, unk_token="<unk>")


def swallowing() -> TextCodec:
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<m>", lstrip=True, rstrip=True, normalized=False, special=True)])
    return TextCodec(tokenizer, is_encoder_decoder=False)


def word_piece() -> TextCodec:
    pieces = ["[UNK]", "a", "##a", "b", "##b"]
    made = Tokenizer(models.WordPiece(vocab={piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return wrapped(made, unk_token="[UNK]")


def fusing() -> TextCodec:
    made = Tokenizer(models.BPE(vocab={"<unk>": 0, "a": 1}, merges=[], unk_token="<unk>", fuse_unk=True))
    return wrapped(made, unk_token="<unk>")


def composing() -> TextCodec:
    """One token for each character, once NFC has made one of up to four."""
    made = Tokenizer(models.BPE(vocab={"?": 0, "a": 1}, merges=[], unk_token="?"))
    made.normalizer = normalizers.NFC()
    return wrapped(made)


def bare_word_piece() -> TextCodec:
    """A word of any length is one token."""
    return wrapped(Tokenizer(models.WordPiece(vocab={"?": 0, "a": 1}, unk_token="?")))


def dropping() -> TextCodec:
    return wrapped(Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))


def unigram() -> TextCodec:
    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    return wrapped(made, unk_token="<unk>")


def splitting() -> TextCodec:
    made = byte_level()
    made._tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return TextCodec(made._tokenizer, is_encoder_decoder=False)


TOLD: list[Callable[[], TextCodec]] = [
    demo,
    byte_level,
    lambda: byte_level(normalizers.NFC()),
    lambda: byte_level(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    byte_fallback,
    swallowing,
    composing,
]
UNTOLD: list[Callable[[], TextCodec]] = [
    word_piece,
    bare_word_piece,
    fusing,
    dropping,
    unigram,
    splitting,
    lambda: byte_level(normalizers.Strip()),
    lambda: byte_level(normalizers.StripAccents()),
    lambda: byte_level(normalizers.Replace(" ", "")),
]
CODECS = [make() for make in (*TOLD, *UNTOLD)]
PARTS = [
    " ",
    "the",
    "a",
    "\u1f82",
    "\u03b1\u0313\u0300\u0345",
    "\u00e9",
    "e\u0301",
    "\x00",
    "\U0001f642",
    "<m>",
    "</s>",
    "\ufdfa",
]


@pytest.mark.parametrize("codec", CODECS)
def test_no_text_has_fewer(codec: TextCodec) -> None:
    """Anything that tokenises to a limit or less is not refused for it."""

    @given(parts=st.lists(st.tuples(st.sampled_from(PARTS) | st.text(max_size=5), st.integers(1, 40)), max_size=5))
    @example(parts=[(" ", 400)])
    @example(parts=[("<m>", 1), (" ", 400)])
    @example(parts=[("</s>", 100)])
    @example(parts=[("the", 100)])
    @example(parts=[("\u03b1\u0313\u0300\u0345", 100)])
    @example(parts=[("b", 400)])
    @settings(max_examples=25, deadline=None)
    def holds(parts: list[tuple[str, int]]) -> None:
        text = "".join(part * times for part, times in parts).encode("utf-8", "ignore").decode()
        num_tokens = len(codec.encode(text, add_special_tokens=False))
        assert codec.fewest_tokens(text) <= num_tokens

    holds()


@pytest.mark.parametrize("make", TOLD)
def test_a_giant_is_told_from_its_length(make: Callable[[], TextCodec]) -> None:
    assert make().fewest_tokens("a" * 4_000_000) > 100_000


@pytest.mark.parametrize("make", UNTOLD)
def test_nothing_is_told_where_characters_may_be_dropped(make: Callable[[], TextCodec]) -> None:
    assert make().fewest_tokens("a" * 4_000_000) == 0


def test_a_token_that_takes_white_space_away_leaves_nothing_to_tell() -> None:
    codec = swallowing()
    assert codec.fewest_tokens("a" * 400) > 0
    assert codec.fewest_tokens("<m>" + " " * 400) == 0
    assert len(codec.encode("<m>" + " " * 400)) == 1
