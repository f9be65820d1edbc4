"""What an adapter brings along for its text: a chat template and tokens of its own.

People save their tokenizer beside the adapter. Of its files the chat template and the added tokens are read; of the
tokenizer itself only that its words are the base's own, because the base's is the one that runs. What may be served
of it the codec decides, which knows the base's tokenizer; nothing is rendered here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from peft_serve.adapters.saved_tokenizer import (
    FLAGS,
    KEPT_FILE,
    MAX_SAVED_BYTES,
    SAVED_FILE,
    Foundation,
    reduced,
)
from peft_serve.adapters.strict_json import parse_object
from peft_serve.adapters.verdict import Verdict, quoted

TEMPLATE_FILE: Final = "chat_template.jinja"
TOKENIZER_FILE: Final = "tokenizer_config.json"
ADDED_FILE: Final = "added_tokens.json"
VOCABULARY_FILES: Final = (TEMPLATE_FILE, TOKENIZER_FILE, ADDED_FILE, KEPT_FILE)
"""What is kept of a saved tokenizer, in the order of the digest."""

MAX_TEMPLATE_BYTES: Final = 64 * 1024
MAX_JSON_BYTES: Final = 4 << 20  # Gemma lists its 6,400 unused words in it, flag by flag
MAX_ADDED: Final = 1 << 14
MAX_BYTES: Final[Mapping[str, int]] = {
    TEMPLATE_FILE: MAX_TEMPLATE_BYTES,
    TOKENIZER_FILE: MAX_JSON_BYTES,
    ADDED_FILE: MAX_JSON_BYTES,
    KEPT_FILE: MAX_JSON_BYTES,
    SAVED_FILE: MAX_SAVED_BYTES,
}
"""What an upload may hold of a saved tokenizer, and how much of each."""

MAX_TOKEN_CHARS: Final = 256
MAX_ID: Final = 1 << 31

_NAMED: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED: Final = ("additional_special_tokens", "extra_special_tokens")
_TRAITS: Final = tuple(flag for flag in FLAGS if flag != "special")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A chat template, and tokens by their text, each with its id. Both as the files say, unchecked by a base."""

    chat_template: str | None = None
    added: Mapping[str, int] = field(default_factory=dict)
    special: frozenset[str] = frozenset()  # those of `added` that are left out of generated text
    traits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of `added`: flags of AddedToken that are set
    names: Mapping[str, str] = field(default_factory=dict)  # special tokens by what a template calls them (`eos_token`)
    foundation: Foundation | None = None  # the words they were added to, until they are compared with the base's

    def __bool__(self) -> bool:
        return self.chat_template is not None or bool(self.added)

    def place_of(self, token: str) -> str:
        """What a refusal calls an added token."""
        return f"{ADDED_FILE if self.foundation is None else SAVED_FILE}: {quoted(token)}"

    def within(self, num_rows: int) -> Vocabulary:
        """Without the tokens whose ids are beyond an embedding of so many rows."""
        added = {text: number for text, number in self.added.items() if number < num_rows}
        gone = self.added.keys() - added.keys()
        return replace(
            self,
            added=added,
            special=self.special - gone,
            traits={text: those for text, those in self.traits.items() if text not in gone},
            names={name: text for name, text in self.names.items() if text not in gone},
        )


def vocabulary_files(contents: Mapping[str, bytes], reduce: Callable[[bytes], bytes] = reduced) -> dict[str, bytes]:
    """Those of a checkpoint's files that are kept of a saved tokenizer, the tokenizer itself in its reduced form.

    Raises `MalformedUpload` for a tokenizer that cannot be read.
    """
    found = {name: contents[name] for name in VOCABULARY_FILES if name in contents}
    if SAVED_FILE in contents:
        found[KEPT_FILE] = reduce(contents[SAVED_FILE])
    return found


def parse_vocabulary(files: Mapping[str, bytes], verdict: Verdict) -> Vocabulary:
    """What the files named in `VOCABULARY_FILES` say, as far as they are there.

    Raises `MalformedUpload` for a file that cannot be read; what breaks a rule is refused in `verdict`.
    """
    config = _object(files, TOKENIZER_FILE)
    added, traits = _decoder_entries(config.get("added_tokens_decoder"), verdict)
    for text, number in _object(files, ADDED_FILE).items():
        if added.setdefault(text, number) != number:
            verdict.refuse(f"{ADDED_FILE}: {quoted(text)}", f"has another id in {TOKENIZER_FILE}; save both again")
    foundation = _kept(_object(files, KEPT_FILE), added, traits, verdict)
    if len(added) > MAX_ADDED:
        verdict.refuse(TOKENIZER_FILE, f"adds {len(added)} tokens; this server takes at most {MAX_ADDED}")
        return Vocabulary()
    for text, number in added.items():
        _check_token(text, number, verdict)
    names = _names(config, verdict)
    special = {text for text, those in traits.items() if "special" in those} | _called_special(config, names)
    return Vocabulary(
        chat_template=_template(files, config, verdict),
        added=added,
        special=frozenset(special & added.keys()),
        traits={text: tuple(t for t in those if t in _TRAITS) for text, those in traits.items()},
        names=names,
        foundation=foundation,
    )


def _kept(
    kept: Mapping[str, Any], added: dict[str, Any], traits: dict[str, tuple[str, ...]], verdict: Verdict
) -> Foundation | None:
    """What a tokenizer was reduced to: its tokens join the others; the words below them are told by their digest."""
    if not kept:
        return None
    num_ids, digest, tokens = (kept.get(key) for key in ("num_ids", "digest", "tokens"))
    listed = isinstance(tokens, list) and all(isinstance(t, dict) and isinstance(t.get("content"), str) for t in tokens)
    if type(num_ids) is not int or not isinstance(digest, str) or not listed:
        verdict.refuse(KEPT_FILE, f"is not what this server makes of a {SAVED_FILE}; upload that instead")
        return None
    for token in tokens or ():
        text, number = token["content"], token.get("id")
        if added.setdefault(text, number) != number:
            verdict.refuse(f"{SAVED_FILE}: {quoted(text)}", "has another id in the files beside it; save them again")
        traits.setdefault(text, tuple(flag for flag in FLAGS if token.get(flag) is True))
    return Foundation(num_ids, digest)


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    content = files.get(name)
    return {} if content is None else parse_object(content, name=name, max_bytes=MAX_JSON_BYTES)


def _text_of(token: object) -> str | None:
    """A token's text; older files write an object around it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _names(config: Mapping[str, Any], verdict: Verdict) -> dict[str, str]:
    found = {name: text for name in _NAMED if (text := _text_of(config.get(name))) is not None}
    for name, text in found.items():
        if len(text) > MAX_TOKEN_CHARS:
            verdict.refuse(f"{TOKENIZER_FILE}: {name}", f"must be of at most {MAX_TOKEN_CHARS} characters")
    return found


def _called_special(config: Mapping[str, Any], names: Mapping[str, str]) -> set[str]:
    """The tokens that the tokenizer's config calls special: by a name, or in its lists of others."""
    tokens: list[object] = [*names.values()]
    for name in _LISTED:
        more = config.get(name)
        tokens += more if isinstance(more, list) else []
    return {text for token in tokens if (text := _text_of(token)) is not None}


def _decoder_entries(entries: object, verdict: Verdict) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """`added_tokens_decoder`: id -> {content, special, ...}. Tokens with their ids, and with the flags they set."""
    added: dict[str, Any] = {}
    traits: dict[str, tuple[str, ...]] = {}
    if entries is None:
        return added, traits
    place = f"{TOKENIZER_FILE}: added_tokens_decoder"
    if not isinstance(entries, dict):
        verdict.refuse(place, "must be an object from ids to tokens; save the tokenizer again")
        return added, traits
    for key, entry in entries.items():
        text = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not key.isdecimal() or len(key) > 10 or text in added:
            verdict.refuse(place, f"has an entry {quoted(key)} that is no token; save the tokenizer again")
            continue
        added[text] = int(key)
        traits[text] = tuple(flag for flag in FLAGS if entry.get(flag) is True)
    return added, traits


def _check_token(text: str, number: object, verdict: Verdict) -> None:
    if not text or len(text) > MAX_TOKEN_CHARS:
        verdict.refuse(f"{ADDED_FILE}: {quoted(text)}", f"must be of 1 to {MAX_TOKEN_CHARS} characters")
    if type(number) is not int or not 0 <= number < MAX_ID:
        verdict.refuse(f"{ADDED_FILE}: {quoted(text)}", f"has the id {quoted(number)}; an id is a whole number")


def _template(files: Mapping[str, bytes], config: Mapping[str, Any], verdict: Verdict) -> str | None:
    """The template's own file, else the field of the tokenizer's config; of several the one called `default`."""
    content = files.get(TEMPLATE_FILE)
    template: object = config.get("chat_template")
    place = f"{TOKENIZER_FILE}: chat_template"
    if content is not None:
        place = TEMPLATE_FILE
        try:
            template = content.decode("utf-8")
        except UnicodeDecodeError:
            verdict.refuse(place, "is not UTF-8 text; save the tokenizer again")
            return None
    if isinstance(template, list):
        named = [e for e in template if isinstance(e, dict) and e.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is None:
        return None
    if not isinstance(template, str) or not template or len(template.encode()) > MAX_TEMPLATE_BYTES:
        verdict.refuse(place, f"must be a template of at most {MAX_TEMPLATE_BYTES} bytes")
        return None
    return template
