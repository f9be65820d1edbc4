"""How few tokens a text can have, told from its length: a text of megabytes need not be read to know it is too long.

Sound, never exact: no text has fewer tokens than are told. It rests on two facts of a tokenizer, that no token stands
for more characters than the longest entry of the vocabulary has, and that no character is dropped. Many tokenizers
do drop some (white space runs into one, accents go, a whole word becomes one unknown token), and of those nothing is
told. Knows the parts of the `tokenizers` library, and no limit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import pre_tokenizers

from peft_serve.fast_tokenizer import is_plain

MAX_COMPOSED: Final = 4
"""NFC and NFKC make one character of at most so many: the longest canonical decomposition in Unicode."""

_NORMALIZERS: Final[Mapping[str, int]] = {
    "NFC": MAX_COMPOSED,
    "NFKC": MAX_COMPOSED,
    "NFD": 1,
    "NFKD": 1,
    "Lowercase": 1,
    "Prepend": 1,
    "ByteLevel": 1,
}
_PRE_TOKENIZERS: Final = frozenset({"ByteLevel", "Split", "Digits", "Punctuation", "Metaspace"})
_BYTE_ALPHABET: Final = frozenset(range(256))


@dataclass(frozen=True, slots=True, kw_only=True)
class FewestTokens:
    """`chars_per_token` is the most that one token stands for; a text with one of `swallowers` in it, added tokens
    that take the white space beside them, may have any number."""

    chars_per_token: int
    swallowers: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> FewestTokens | None:
        """What can be told of a tokenizer; None: nothing."""
        if not is_plain(tokenizer):
            return None
        backend = tokenizer.backend_tokenizer
        shrinking = _shrinking(_state(backend.normalizer))
        if shrinking is None or not _keeps_all(_state(backend.pre_tokenizer)):
            return None
        vocab: dict[str, int] = backend.get_vocab(True)
        if not _knows_all(backend, vocab):
            return None
        longest, swallowers = max(map(len, vocab), default=1), []
        for added in backend.get_added_tokens_decoder().values():
            content = added.content
            if added.normalized and backend.normalizer is not None:  # it is looked for in normalised text
                if added.lstrip or added.rstrip:
                    return None
                content = backend.normalizer.normalize_str(content)
            if added.lstrip or added.rstrip:
                swallowers.append(content)
            longest = max(longest, len(content))
        return cls(chars_per_token=max(1, longest * shrinking), swallowers=tuple(swallowers))

    def in_text(self, text: str) -> int:
        """No fewer tokens than this has `text`; 0 where nothing can be told."""
        if any(swallower in text for swallower in self.swallowers):
            return 0
        return -(-len(text) // self.chars_per_token)


def _state(part: Any) -> dict[str, Any] | None:
    return None if part is None else json.loads(part.__getstate__())


def _shrinking(normalizer: dict[str, Any] | None) -> int | None:
    """Of how many characters the normalizer makes one, at most; None: of any number."""
    if normalizer is None:
        return 1
    kind = normalizer["type"]
    if kind == "Sequence":
        whole = 1
        for part in normalizer["normalizers"]:
            factor = _shrinking(part)
            if factor is None:
                return None
            whole *= factor
        return whole
    if kind == "Replace":
        pattern, content = normalizer["pattern"].get("String"), normalizer["content"]
        if not pattern or not content:
            return None
        return max(1, -(-len(pattern) // len(content)))
    return _NORMALIZERS.get(kind)


def _keeps_all(splitter: dict[str, Any] | None) -> bool:
    """Whether every character gets into some word."""
    if splitter is None:
        return True
    if splitter["type"] == "Sequence":
        return all(_keeps_all(part) for part in splitter["pretokenizers"])
    return splitter["type"] in _PRE_TOKENIZERS and splitter.get("behavior") != "Removed"


def _knows_all(backend: Any, vocab: Mapping[str, int]) -> bool:
    """Whether each character, also one that is not in the vocabulary, becomes a token of its own at least in part."""
    model = backend.model
    if type(model).__name__ != "BPE" or model.continuing_subword_prefix:
        return False
    if model.byte_fallback and all(f"<0x{byte:02X}>" in vocab for byte in _BYTE_ALPHABET):
        return True
    if model.unk_token is not None and model.unk_token in vocab and not model.fuse_unk:
        return True
    return _is_byte_level(backend) and all(letter in vocab for letter in _byte_letters())


def _is_byte_level(backend: Any) -> bool:
    """Whether the model is given bytes, each written as one letter."""
    states = (_state(backend.normalizer), _state(backend.pre_tokenizer))
    return any(state is not None and '"ByteLevel"' in json.dumps(state) for state in states)


def _byte_letters() -> list[str]:
    return list(pre_tokenizers.ByteLevel.alphabet())
