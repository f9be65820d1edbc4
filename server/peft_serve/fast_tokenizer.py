"""The two calls that a tokenizer gets for every request and every token, below transformers' bookkeeping.

transformers checks, batches and wraps what the `tokenizers` library does; for a short prompt, or the few ids that one
more token of text needs, that takes longer than the work itself. A tokenizer whose class has a way of its own is asked
in that way. Owns nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from transformers import PreTrainedTokenizerFast

SHORT_CHARS: Final = 1024
"""Longer texts are encoded by the call for batches: it takes longer to begin, but lets other Python threads run."""


def encoder_of(tokenizer: Any) -> Callable[[str, bool], list[int]]:
    """What turns a text into ids, with the tokenizer's special tokens around it if told so.

    A truncation or padding that its file asks for is off from now on, as transformers' own call would leave it.
    """
    if is_plain(tokenizer):
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()

        def encoded(text: str, add_special_tokens: bool) -> list[int]:
            if len(text) <= SHORT_CHARS:
                found = backend.encode(text, add_special_tokens=add_special_tokens)
            else:
                (found,) = backend.encode_batch([text], add_special_tokens=add_special_tokens)
            ids: list[int] = found.ids
            return ids

        return encoded

    def asked(text: str, add_special_tokens: bool) -> list[int]:
        ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return [int(i) for i in ids]

    return asked


def is_plain(tokenizer: Any) -> bool:
    """Whether a text goes into the `tokenizers` library as it is, and its ids are what comes out."""
    if not _shares(tokenizer, "__call__") or not _shares(tokenizer, "_encode_plus"):
        return False
    return not tokenizer.split_special_tokens and not hasattr(tokenizer, "_switch_to_input_mode")


def decoder_of(tokenizer: Any) -> Callable[[list[int], bool], str]:
    """What turns ids into text, special ones left out if told so; spaces are never cleaned up."""
    if _shares(tokenizer, "decode") and _shares(tokenizer, "_decode"):
        decode: Callable[[list[int], bool], str] = tokenizer.backend_tokenizer.decode
        return decode

    def decoded(ids: list[int], skip_special_tokens: bool) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))

    return decoded


def _shares(tokenizer: Any, method: str) -> bool:
    """Whether the tokenizer is a fast one, and does this as they all do."""
    plain = PreTrainedTokenizerFast
    return isinstance(tokenizer, plain) and getattr(type(tokenizer), method) is getattr(plain, method)
