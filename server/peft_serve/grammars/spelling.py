"""Spelling: the bytes that each token of a tokenizer stands for.

Read from the tokenizer's own description (the JSON of the `tokenizers` library), because decoding tokens one by one
loses what a single token cannot say: half of a character, the space in front of a first word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE: Final = "\u2581"


class Unspellable(ValueError):  # noqa: N818  # the tree of errors names refusals
    """A tokenizer whose tokens stand for no bytes that can be told."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """Bytes by token id; empty for special tokens and for ids without a token."""

    tokens: tuple[bytes, ...]
    drops_first_space: bool  # a space at the very beginning of a decoded text is not shown


def spelling_of(description: str, *, special: frozenset[int], size: int) -> Spelling:
    """The spelling of ids 0 to `size` - 1. `special` ids are no text, whatever the description says of them.

    Raises Unspellable.
    """
    parts: Mapping[str, Any] = json.loads(description)
    steps = list(_steps(parts.get("decoder")))
    kinds = {str(step.get("type")) for step in steps}
    if "ByteLevel" in kinds:
        spell = _spell_byte_level
    elif "Metaspace" in kinds or _replaces_metaspace(steps):
        spell = _spell_with_byte_tokens if "ByteFallback" in kinds else _spell_metaspace
    else:
        raise Unspellable(f"its tokens are put together in a way of their own ({', '.join(sorted(kinds)) or 'none'})")
    tokens = [b""] * size
    for text, number in _vocabulary(parts.get("model") or {}):
        if number < size:
            tokens[number] = spell(text)
    for added in parts.get("added_tokens") or ():
        if int(added["id"]) < size:
            tokens[int(added["id"])] = b"" if added.get("special") else str(added["content"]).encode()
    for number in special:
        if number < size:
            tokens[number] = b""
    return Spelling(tuple(tokens), drops_first_space=_drops_first_space(steps))


def _steps(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The decoder's steps, those of a sequence one by one."""
    if decoder is None:
        return
    if decoder.get("type") == "Sequence":
        for step in decoder.get("decoders") or ():
            yield from _steps(step)
    else:
        yield decoder


def _replaces_metaspace(steps: list[Mapping[str, Any]]) -> bool:
    return any(
        step.get("type") == "Replace"
        and (step.get("pattern") or {}).get("String") == _METASPACE
        and step.get("content") == " "
        for step in steps
    )


def _drops_first_space(steps: list[Mapping[str, Any]]) -> bool:
    """Metaspace decoders, and Llama's `Strip`, take the space away that their encoders put in front."""
    for step in steps:
        if step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return True
        if step.get("type") == "Strip" and step.get("content") == " " and step.get("start", 0) > 0:
            return True
    return False


def _vocabulary(model: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every token of the model with its id: a mapping, or Unigram's list of pairs."""
    vocab = model.get("vocab") or {}
    if isinstance(vocab, Mapping):
        yield from ((str(text), int(number)) for text, number in vocab.items())
    else:
        yield from ((str(pair[0]), number) for number, pair in enumerate(vocab))


def _bytes_by_letter() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for letters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES_BY_LETTER: Final[Mapping[str, int]] = _bytes_by_letter()


def _spell_byte_level(text: str) -> bytes:
    try:
        return bytes(_BYTES_BY_LETTER[letter] for letter in text)
    except KeyError:  # a token that was not made of these letters is written as it is
        return text.encode()


def _spell_metaspace(text: str) -> bytes:
    return text.replace(_METASPACE, " ").encode()


def _spell_with_byte_tokens(text: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(text)
    return bytes([int(byte[1], 16)]) if byte else _spell_metaspace(text)
