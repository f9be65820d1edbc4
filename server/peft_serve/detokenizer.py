"""Ids to text, one token at a time.

Owns the ids of one answer. Knows no request, and of a tokenizer only how it decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

_REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


def decoder_of(tokenizer: Any) -> Callable[[list[int], bool], str]:
    """What decodes ids, special ones left out if told so, without cleaning spaces up.

    A tokenizer that decodes as fast ones do is asked below transformers' own bookkeeping, which takes longer than the
    decoding of a few ids; one that has a way of its own is asked in it.
    """
    kind, plain = type(tokenizer), PreTrainedTokenizerFast
    if isinstance(tokenizer, plain) and kind.decode is plain.decode and kind._decode is plain._decode:
        decode: Callable[[list[int], bool], str] = tokenizer.backend_tokenizer.decode
        return decode

    def decoded(ids: list[int], skip_special_tokens: bool) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))

    return decoded


class Detokenizer:
    """Turns ids into text as they come, never showing half a character.

    Some tokenizers decode a token differently at the start of a text (a leading space is dropped), so each piece
    is read as the difference between two decodings that share a few ids of context.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(context)
        self._start = 0
        self._read = len(self._ids)

    def push(self, token: int) -> str:
        """The text that `token` completes, perhaps none."""
        self._ids.append(token)
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        if len(text) <= len(known) or text.endswith(_REPLACEMENT):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def flush(self) -> str:
        """What is left at the end, an incomplete character included."""
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        self._start, self._read = self._read, len(self._ids)
        return text[len(known) :]
