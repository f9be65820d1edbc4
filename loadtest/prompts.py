"""Prompts: synthetic text whose length in tokens is known beforehand.

The words are all three-letter strings over eight letters. On the bases that `loadtest.bases` makes, each word
with the space before it is exactly one token, so n words are n tokens. On any other base the count is near, and
the server's ``x-prompt-tokens`` header says what it really was.
"""

from itertools import product

import numpy as np

LETTERS = "abdeinor"
WORD_LENGTH = 3


def words() -> list[str]:
    """The 512 words, in a fixed order."""
    return ["".join(letters) for letters in product(LETTERS, repeat=WORD_LENGTH)]


def synthetic_text(num_tokens: int, rng: np.random.Generator, vocabulary: list[str]) -> str:
    """`num_tokens` words, each after one space (the first as well, so that each is one token)."""
    return "".join(" " + vocabulary[number] for number in rng.integers(len(vocabulary), size=num_tokens))
