"""A saved `tokenizer.json`, reduced to what is kept of it: its added tokens, and a digest of the words below them.

transformers 5 writes an adapter's added tokens nowhere else. The file has tens of megabytes, nearly all of them the
base's own vocabulary, so it is reduced once, when a checkpoint is read, and never stored. Only its beginning is
parsed, up to the model's vocabulary: what follows (BPE's merges) is most of the file and says nothing new.
Whether the words below are the base's own is for the codec to say, which knows the base's tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from peft_serve.adapters.strict_json import parse_beginning
from peft_serve.adapters.verdict import quoted
from peft_serve.errors import AdapterInvalid, MalformedUpload, Refusal

SAVED_FILE: Final = "tokenizer.json"
KEPT_FILE: Final = "tokenizer_tokens.json"
"""The name that the reduced form is kept under."""

MAX_SAVED_BYTES: Final = 64 << 20
MAX_ENTRIES: Final = 1 << 21  # words, scores and merges; the longest lists in use, Gemma's, come to 1.4 million
FLAGS: Final = ("special", "lstrip", "rstrip", "single_word", "normalized")
_SAVE_AGAIN: Final = "save the tokenizer again with save_pretrained"
_LEAVE_OUT: Final = "leave the file out if the adapter was trained with the base's tokenizer"


@dataclass(frozen=True, slots=True)
class Foundation:
    """The words that added tokens stand on: all with ids below `num_ids`, by their digest."""

    num_ids: int
    digest: str

    def check(self, words: Mapping[str, int]) -> None:
        """Raise AdapterInvalid unless the base's own words below `num_ids` are these."""
        if digest_of(words, self.num_ids) != self.digest:
            reason = f"holds other words than the base's tokenizer among its first {self.num_ids}"
            way_out = "train with the base's tokenizer, or leave the file out if the adapter was trained without it"
            raise AdapterInvalid([Refusal(f"{SAVED_FILE}: model.vocab", f"{reason}; {way_out}")])


def digest_of(words: Mapping[str, int], num_ids: int) -> str:
    """A digest of a vocabulary's words with ids below `num_ids`: of each id with its text, in the order of the ids."""
    below = sorted((number, text) for text, number in words.items() if number < num_ids)
    return hashlib.sha256(json.dumps(below).encode()).hexdigest()


def reduced(content: bytes) -> bytes:
    """What is kept of a `tokenizer.json`: the tokens above the last word that is not an added one, as JSON.

    Raises `MalformedUpload` for a file that the tokenizers library did not write.
    """
    if content.count(b",") > MAX_ENTRIES:  # each costs far more memory than the bytes that say it
        raise MalformedUpload(f"{SAVED_FILE} lists more than {MAX_ENTRIES} words and merges; {_LEAVE_OUT}")
    saved = parse_beginning(content, name=SAVED_FILE, path=("model", "vocab"), max_bytes=MAX_SAVED_BYTES)
    model = saved.get("model")
    words = _words(model.get("vocab") if isinstance(model, dict) else None)
    added: dict[str, dict[str, Any]] = {}
    for token in _tokens(saved.get("added_tokens")):
        text = token["content"]
        added[text] = token
        if words.setdefault(text, token["id"]) != token["id"]:
            raise MalformedUpload(f"{SAVED_FILE}: added token {quoted(text)} has two ids; {_SAVE_AGAIN}")
    num_ids = 1 + max((number for text, number in words.items() if text not in added), default=-1)
    kept = {
        "num_ids": num_ids,
        "digest": digest_of(words, num_ids),
        "tokens": sorted((t for t in added.values() if t["id"] >= num_ids), key=lambda token: int(token["id"])),
    }
    return json.dumps(kept, separators=(",", ":")).encode()


class Reduction:
    """`reduced`, remembered for the last few files: the adapters of one base lie beside copies of one tokenizer.

    Thread-safe.
    """

    def __init__(self, num_kept: int = 8) -> None:
        self._num_kept = num_kept
        self._made: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, content: bytes) -> bytes:
        key = hashlib.sha256(content).digest()
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return self._made[key]
        made = reduced(content)
        with self._lock:
            self._made[key] = made
            while len(self._made) > self._num_kept:
                self._made.popitem(last=False)
        return made


def _words(vocab: object) -> dict[str, int]:
    """A model's words with their ids: an object, or in order as Unigram has them, each with its score."""
    if isinstance(vocab, dict) and all(type(number) is int and number >= 0 for number in vocab.values()):
        return dict(vocab)
    if isinstance(vocab, list) and all(isinstance(e, list) and len(e) == 2 and isinstance(e[0], str) for e in vocab):
        return {entry[0]: number for number, entry in enumerate(vocab)}
    raise MalformedUpload(f"{SAVED_FILE}: model.vocab is neither ids by words nor a list of words; {_SAVE_AGAIN}")


def _tokens(entries: object) -> Iterator[dict[str, Any]]:
    """`added_tokens`, each reduced to its id, its text and the flags it sets."""
    if not isinstance(entries, list):
        raise MalformedUpload(f"{SAVED_FILE} has no list of added_tokens before its model; {_SAVE_AGAIN}")
    for entry in entries:
        text, number = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(text, str) or type(number) is not int or number < 0:
            raise MalformedUpload(f"{SAVED_FILE}: added_tokens holds {quoted(entry)}, which is no token; {_SAVE_AGAIN}")
        yield {"id": number, "content": text, **{flag: True for flag in FLAGS if entry.get(flag) is True}}
