"""A vocabulary: the small byte-level tokenizer that the synthetic bases carry.

Tokens are two specials, the 256 bytes, and a trie of words over the eight letters of `loadtest.prompts`, breadth
first until the size is reached: " a" is a token made of " " and "a", " ab" one made of " a" and "b". Every word
of the prompts is therefore one token, and every token id decodes to some text.
"""

from collections.abc import Iterator
from itertools import islice, product

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from loadtest.prompts import LETTERS, WORD_LENGTH

END = "<|endoftext|>"
PAD = "<|pad|>"
SPACE = "\u0120"
"""How a space is written in a byte-level vocabulary."""

MIN_VOCABULARY = 2 + 256 + sum(len(LETTERS) ** length for length in range(1, WORD_LENGTH + 1))
"""The fewest tokens that hold every word of the prompts."""


def _steps() -> Iterator[tuple[str, str]]:
    """Trie edges (known prefix, next letter), breadth first, without end."""
    length = 0
    while True:
        for letters in product(LETTERS, repeat=length):
            for letter in LETTERS:
                yield SPACE + "".join(letters), letter
        length += 1


def make_tokenizer(size: int) -> Tokenizer:
    """A tokenizer of exactly `size` tokens, the same every time; ids 0 and 1 are END and PAD."""
    if size < MIN_VOCABULARY:
        raise ValueError(f"a vocabulary of {size} cannot hold the prompts' words; it takes {MIN_VOCABULARY}")
    names = [END, PAD, *sorted(ByteLevel.alphabet())]
    merges = list(islice(_steps(), size - len(names)))
    names += [prefix + letter for prefix, letter in merges]
    tokenizer = Tokenizer(BPE(vocab={name: number for number, name in enumerate(names)}, merges=merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([END, PAD])
    return tokenizer
