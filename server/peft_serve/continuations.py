"""The ids by which words continue a prompt: the choices of a request.

On a decoder-only base the words are parted from the prompt by a space unless it ends in white space, and tokenised
together with it, so that the ids are those the model would have to produce. Where the prompt has a seam (`seams.py`)
only what stands behind it is tokenised with each of the words, and the ids are the same. No end-of-sequence id is
added. Owns nothing but the prompt's end.
"""

from __future__ import annotations

from collections.abc import Callable

from peft_serve.errors import BadRequest
from peft_serve.seams import Seams

Encode = Callable[[str, bool], list[int]]
"""A text's ids, with the tokenizer's special tokens around it if told so."""


class Continuations:
    """Of one prompt; thread-safe, as `encode` is. `prompt` is None where an answer stands alone."""

    def __init__(self, prompt: str | None, encode: Encode, *, special_ids: frozenset[int], seams: Seams | None) -> None:
        self._encode = encode
        self._special_ids = special_ids
        self._prompt = prompt
        end = None if seams is None or prompt is None else seams.end_of(prompt)
        self._is_cut = end is not None
        self._end = (prompt or "") if end is None else end
        self._before = [] if prompt is None else encode(self._end, not self._is_cut)

    @property
    def num_chars(self) -> int:
        """Characters that are tokenised with each of the words."""
        return len(self._end)

    def ids(self, words: str) -> tuple[int, ...]:
        """The ids of `words`; raises BadRequest where they have none."""
        ids = self._encode(words, False) if self._prompt is None else self._behind(words)
        if not ids:
            raise BadRequest(f"choices: {words!r} has no tokens; give a word the tokenizer knows", param="choices")
        return tuple(ids)

    def _behind(self, words: str) -> list[int]:
        assert self._prompt is not None, "the words continue a prompt"
        glue = "" if not self._prompt or self._prompt[-1].isspace() else " "
        before, whole = self._before, self._encode(self._end + glue + words, not self._is_cut)
        # A tokenizer that ends its prompts with a special token (a few add one) must not end the words' so.
        while before and whole and before[-1] == whole[-1] and before[-1] in self._special_ids:
            before, whole = before[:-1], whole[:-1]
        if self._is_cut and not (before and whole):  # what stands before the seam would be looked at next
            uncut = Continuations(self._prompt, self._encode, special_ids=self._special_ids, seams=None)
            return uncut._behind(words)
        is_same = whole[: len(before)] == before
        return whole[len(before) :] if is_same else self._encode(words, False)
