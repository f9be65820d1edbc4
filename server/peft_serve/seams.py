"""Where a text may be cut so that its end has the same tokens alone as it has behind all the rest.

A choice is tokenised behind its prompt, and with 256 choices a long prompt need not be read 256 times. A seam is the
space in `x y`, where x and y are ASCII letters. Sound, and not exact: of a tokenizer or a text of which nothing can be
told there is no seam, and the whole text has to be read.

It rests on this. The tokens left and right of a seam come from different words, because the tokenizer parts words
there whatever else the text holds; or they come from one word of a byte-pair model, and no entry of the vocabulary
holds a letter with a space behind it, so that no merge can reach across. Normalisers, patterns and added tokens are
let through only if none of them looks to the left of a seam. Knows the parts of the `tokenizers` library.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from string import ascii_letters
from typing import Any, Final

from peft_serve.fast_tokenizer import is_plain

SPACE_LETTER: Final = "\u2581"
"""What sentencepiece and its relatives write for a space."""

_WINDOW: Final = 4096  # characters of the end of a text that are looked through
_SEAM: Final = re.compile("(?<=[A-Za-z]) (?=[A-Za-z])")
_REACHING: Final = re.compile(rf"[A-Za-z][\s{SPACE_LETTER}]")
_LOCAL_NORMALIZERS: Final = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"})
_PARTING: Final = frozenset({"BertPreTokenizer", "Whitespace", "WhitespaceSplit"})
_NEUTRAL: Final = frozenset({"Digits", "Punctuation"})

_ENDINGS: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST: Final = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PATTERNS: Final = frozenset(
    {
        # GPT-2
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        # Llama 3; Qwen 2
        _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST,
        _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST,
        # GPT-4o
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _REST,
    }
)
"""Patterns of words that are known to end a word behind a letter that a space follows, and look to no left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seams:
    """`skips_space`: the tokenizer puts a space in front of every text, so that the end of one begins behind it."""

    skips_space: bool

    @classmethod
    def of(cls, tokenizer: Any) -> Seams | None:
        """The seams of texts for a tokenizer; None: there are none."""
        if not is_plain(tokenizer):
            return None
        backend = tokenizer.backend_tokenizer
        kinds = _normalizers(_state(backend.normalizer))
        if kinds is None or _added_reach(backend):
            return None
        skips, writes = "Prepend" in kinds, "Replace" in kinds
        if (skips and not writes) or getattr(backend.model, "dropout", None) or not _ends_specially(tokenizer):
            return None
        words = _state(backend.pre_tokenizer)
        is_parted = _is_parted(words, writes_spaces=writes)
        if is_parted is False:
            is_parted = (writes or "Metaspace" in json.dumps(words)) and _merges_apart(backend)
        return cls(skips_space=skips) if is_parted else None

    def end_of(self, text: str) -> str | None:
        """The end of `text` behind its last seam; None: no seam was found."""
        start = max(0, len(text) - _WINDOW)
        seams = [found.start() for found in _SEAM.finditer(text, start)]
        return text[seams[-1] + self.skips_space :] if seams else None


def _state(part: Any) -> dict[str, Any] | None:
    return None if part is None else json.loads(part.__getstate__())


def _normalizers(state: dict[str, Any] | None) -> frozenset[str] | None:
    """The kinds of normalisers, if each of them treats a text's end as it does behind all the rest."""
    if state is None:
        return frozenset()
    kind = state["type"]
    if kind == "Sequence":
        found = [_normalizers(part) for part in state["normalizers"]]
        return None if None in found else frozenset().union(*(each for each in found if each is not None))
    is_known = (
        kind in _LOCAL_NORMALIZERS
        or (kind == "Prepend" and state["prepend"] == SPACE_LETTER)
        or (kind == "Replace" and state["pattern"] == {"String": " "} and state["content"] == SPACE_LETTER)
    )
    return frozenset({kind}) if is_known else None


def _is_parted(state: dict[str, Any] | None, *, writes_spaces: bool) -> bool | None:
    """Whether words are parted at every seam; False: perhaps not; None: they may be parted according to the left.

    `writes_spaces`: a normaliser has written another letter for each space by then.
    """
    if state is None:
        return False
    kind = state["type"]
    if kind == "Sequence":
        return _is_any_parted(state["pretokenizers"], writes_spaces=writes_spaces)
    if kind == "Metaspace":
        return bool(state.get("split", True)) if state["replacement"] == SPACE_LETTER else None
    if kind == "Split":
        return _is_split(state, writes_spaces=writes_spaces)
    if kind == "ByteLevel":
        return bool(state.get("use_regex", True)) and not writes_spaces
    if kind in _PARTING:
        return None if writes_spaces else True
    return False if kind in _NEUTRAL else None


def _is_any_parted(states: list[dict[str, Any]], *, writes_spaces: bool) -> bool | None:
    """The pre-tokenizers of a sequence, each of which is given the words of the one before it."""
    parts = False
    for state in states:
        found = _is_parted(state, writes_spaces=writes_spaces)
        if found is None:
            return None
        parts = parts or found
        # The bytes' letters, and the one for a space, are what the next one sees.
        writes_spaces = writes_spaces or state["type"] in ("ByteLevel", "Metaspace")
    return parts


def _is_split(state: dict[str, Any], *, writes_spaces: bool) -> bool | None:
    pattern = state["pattern"]
    if pattern == {"String": " "}:
        if writes_spaces:
            return False  # there is no space to be found
        return True if state["behavior"] != "MergedWithPrevious" and not state.get("invert") else None
    if writes_spaces or pattern.get("Regex") not in _PATTERNS:
        return None
    is_kept = state["behavior"] == ("Removed" if state.get("invert") else "Isolated")
    return True if is_kept else None


def _ends_specially(tokenizer: Any) -> bool:
    """Whether all that is put behind a text are special tokens, which are told from the words before them."""
    ended = tokenizer.backend_tokenizer.encode("x")
    last = max((i for i, is_special in enumerate(ended.special_tokens_mask) if not is_special), default=-1)
    return set(ended.ids[last + 1 :]) <= set(tokenizer.all_special_ids)


def _added_reach(backend: Any) -> bool:
    """Whether an added token may stand across a seam, or look to the left of one."""
    normalizer = backend.normalizer
    for added in backend.get_added_tokens_decoder().values():
        spelled = [added.content]
        if added.normalized and normalizer is not None:
            spelled.append(normalizer.normalize_str(added.content))
        if added.rstrip or added.single_word or any(map(_REACHING.search, spelled)):
            return True
    return False


def _merges_apart(backend: Any) -> bool:
    """Whether the tokens of one word of a byte-pair model never reach across a seam."""
    model = backend.model
    if type(model).__name__ != "BPE" or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    vocab: dict[str, int] = backend.get_vocab(False)
    if not all(letter in vocab for letter in (*ascii_letters, SPACE_LETTER)):
        return False  # several letters that are not known become one token
    return not any(SPACE_LETTER in piece and _REACHING.search(piece) for piece in vocab)
