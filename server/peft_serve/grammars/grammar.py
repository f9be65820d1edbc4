"""A grammar, as it was asked for: checked for size and depth, and put in the words of llguidance's Lark.

Facts and pure functions; what a grammar means is found out where it is compiled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

MAX_DEPTH: Final = 64
"""Levels of a JSON schema."""

MAX_REASON_CHARS: Final = 240

_TOO_LARGE: Final = re.compile(
    r"\blimits\.\w|^panic\b|^lexer precomputation|literal invalid|too (?:big|large)|size exceeded"
)
_UNREADABLE: Final = re.compile(r"lexer error$")
_NOT_DONE: Final = re.compile(r"Unimplemented keys: \[(.*?)\]")
_QUOTED: Final = re.compile(r"'[^']*'|\"[^\"]*\"")
"""What the library says of its own insides, or in its own terms, where a caller needs to know what to do."""

_WHITE_SPACE: Final = " "
"""Between the parts of JSON: one space or nothing. A model that may indent may also never stop indenting."""

_OPTIONS: Final = '%llguidance {"no_forcing": true}\n'
"""Every token that fits may come, not only the one by which the tokenizer would have spelled what must come."""

_CLASSES: Final = "dw"
"""What is ASCII in a regular expression: digits and letters of a word, as in JSON schemas."""


class GrammarRefused(ValueError):  # noqa: N818  # the tree of errors names refusals
    """A grammar that is none, or too large; the message says why."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer is, as one expression of Lark, or as a whole grammar of the caller's."""

    inner: str
    is_whole: bool = False  # all the rules of a grammar, in Lark's words or in GBNF

    @property
    def num_bytes(self) -> int:
        return len(self.inner.encode("utf-8", "surrogatepass"))

    def lark(self, *, may_begin_with_space: bool) -> str:
        """The grammar for the compiler; a space in front is let pass where the reader will not see it.

        Raises GrammarRefused.
        """
        if self.is_whole:
            return _OPTIONS + _as_lark(self.inner)
        start = "start: / ?/ body\nbody: " if may_begin_with_space else "start: "
        return f"{_OPTIONS}{start}{self.inner}\n"


def of_json_schema(schema: object) -> Grammar:
    """JSON that a schema allows; a string is read as JSON first. Raises GrammarRefused."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise GrammarRefused("a schema given as text has to be JSON") from error
    if not isinstance(schema, Mapping):
        raise GrammarRefused("a schema is a JSON object")
    if _depth(schema) > MAX_DEPTH:
        raise GrammarRefused(f"a schema has at most {MAX_DEPTH} levels")
    own = {**schema, "x-guidance": {"whitespace_pattern": _WHITE_SPACE}}
    return Grammar("%json " + json.dumps(own))


def of_json_object() -> Grammar:
    """Any JSON object."""
    return of_json_schema({"type": "object"})


def of_regex(pattern: str) -> Grammar:
    """A text that matches as a whole; anchors at its ends say nothing more. Raises GrammarRefused."""
    if not pattern:
        raise GrammarRefused("a pattern has one character at least")
    pattern = pattern.removeprefix("^")
    if pattern.endswith("$") and not re.search(r"(?<!\\)(\\\\)*\\\$$", pattern):
        pattern = pattern[:-1]
    return Grammar(f"/{regex_to_lark(pattern, _CLASSES)}/")


def of_choice(texts: Sequence[str]) -> Grammar:
    """One of the texts, word for word. Raises GrammarRefused."""
    if not texts or not all(texts):
        raise GrammarRefused("give at least one text, and none that is empty")
    return Grammar(" | ".join(_literal(text) for text in dict.fromkeys(texts)))


def of_rules(text: str) -> Grammar:
    """A grammar in Lark's words, or in GBNF (`root ::= ...`). Raises GrammarRefused."""
    if "%llguidance" in text:
        raise GrammarRefused("%llguidance sets options that are the server's; leave the line out")
    return Grammar(text, is_whole=True)


def shortened(reason: str) -> str:
    """What is wrong with a grammar: in the library's words as far as they are of the grammar, else in ours.

    Left out are the excerpt of the grammar that the library was given, and what it says of its own insides.
    """
    told = re.search(r"^error: (.+)$", reason, re.MULTILINE)
    if told is None:
        lines = re.split(r"\n\s*\d+ \|", reason)[0]
        text = re.sub(r"^at \d+\(\d+\): ", "", lines.replace("<non-verbose/>", ""))
    else:
        text = told[1]
    text = " ".join(text.split()).removeprefix("failed to compile JSON schema: ")
    own_words = _QUOTED.sub("", text)  # a name of the caller's may sound like a limit
    if _TOO_LARGE.search(own_words):
        return "it is too large, or a number in it is; repeat less, and ask for smaller numbers"
    if _UNREADABLE.search(own_words):
        return "it cannot be read; look for quotes and slashes that are not closed"
    text = _NOT_DONE.sub(r"keywords that are not done here: \1; leave them out", text)
    return text if len(text) <= MAX_REASON_CHARS else text[: MAX_REASON_CHARS - 3] + "..."


def _as_lark(rules: str) -> str:
    try:
        return str(any_to_lark(rules))
    except RecursionError as error:
        raise GrammarRefused("its rules are nested too deeply") from error
    except Exception as error:  # what the translator raises is its own affair
        raise GrammarRefused(shortened(str(error))) from error


def _depth(value: object) -> int:
    """Levels of lists and objects inside each other, found without recursion."""
    deepest, open_ = 0, [(value, 1)]
    while open_:
        at, level = open_.pop()
        deepest = max(deepest, level)
        if deepest > MAX_DEPTH:
            break
        children: Sequence[Any] = ()
        if isinstance(at, Mapping):
            children = list(at.values())
        elif isinstance(at, list):
            children = at
        open_ += [(child, level + 1) for child in children if isinstance(child, Mapping | list)]
    return deepest


def _literal(text: str) -> str:
    """The text as a Lark regular expression that matches it alone: strings of Lark do not know every escape."""
    return "/" + "".join(_escaped(letter) for letter in text) + "/"


def _escaped(letter: str) -> str:
    if letter.isascii() and (letter.isalnum() or letter == " "):
        return letter
    return f"\\x{{{ord(letter):x}}}"
