"""How models write tool calls, and how they are read out of an answer as it comes.

Pure text: knows no request. What looks like a call and is none stays text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final


class ToolSyntax(StrEnum):
    """Who writes calls like this; the first three are vLLM's names of parsers."""

    HERMES = "hermes"  # <tool_call>{"name": .., "arguments": {..}}</tool_call>, between words
    LLAMA3_JSON = "llama3_json"  # the whole answer is {"name": .., "parameters": {..}}, several with ; between them
    MISTRAL = "mistral"  # [TOOL_CALLS] [{"name": .., "arguments": {..}}, ..], or a mark, a name and arguments for each
    LIST = "list"  # the whole answer is [{"name": .., "arguments": {..}}, ..]: what a grammar makes of "required"


_OPENINGS: Final = {ToolSyntax.HERMES: "<tool_call>", ToolSyntax.MISTRAL: "[TOOL_CALLS]"}
_CLOSINGS: Final = {ToolSyntax.HERMES: "</tool_call>"}
_PYTHON_TAG: Final = "<|python_tag|>"
_ARGS, _CALL_ID = "[ARGS]", "[CALL_ID]"
_NAMED: Final = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\][^\[\]{}]*)?(?:\[ARGS\])?\s*(?=\{)")
"""How Mistral's newer models begin a call: `name[ARGS]{..}`, or `name[CALL_ID]id[ARGS]{..}`, or `name{..}`."""

MARKS: Final = frozenset({*_OPENINGS.values(), *_CLOSINGS.values(), _PYTHON_TAG, _ARGS, _CALL_ID})
"""What may be a special token of its own, and counts as text here."""


def syntax_of(template: str) -> ToolSyntax | None:
    """The syntax that a chat template teaches; None: none of these."""
    if _OPENINGS[ToolSyntax.HERMES] in template:
        return ToolSyntax.HERMES
    if _OPENINGS[ToolSyntax.MISTRAL] in template:
        return ToolSyntax.MISTRAL
    return ToolSyntax.LLAMA3_JSON if _PYTHON_TAG in template or '"parameters"' in template else None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function to call, and its arguments as JSON text."""

    name: str
    arguments: str


class _At(StrEnum):
    START = "start"  # nothing but white space so far, and a call needs no mark
    WORDS = "words"
    CALL = "call"  # behind a mark, or a bracket
    BEHIND = "behind"  # behind a call, where its closing mark or a separator may come


class CallReader:
    """Push the answer piece by piece, then flush: words (`str`) and calls come out in order."""

    def __init__(self, syntax: ToolSyntax, *, is_single: bool = False) -> None:
        """`is_single`: calls behind the first are dropped, as `parallel_tool_calls: false` wants it."""
        self._opening = _OPENINGS.get(syntax, "")
        self._closing = _CLOSINGS.get(syntax, "")
        self._has_separators = syntax is ToolSyntax.LLAMA3_JSON
        self._has_names = syntax is ToolSyntax.MISTRAL  # in front of the arguments
        self._is_single = is_single
        self._at = _At.WORDS if self._opening else _At.START
        self._held = ""
        self._space = ""  # white space that is shown only with the words behind it
        self._is_behind_call = False
        self.num_calls = 0

    def push(self, text: str) -> list[str | ToolCall]:
        self._held += text
        found: list[str | ToolCall] = []
        while self._advance(found, text):
            pass
        return found

    def flush(self) -> list[str | ToolCall]:
        """What was held back; a call that was not finished is words."""
        found: list[str | ToolCall] = []
        if self._at is not _At.BEHIND or not self._closing.startswith(self._held.strip()):
            self._say(self._held, found)
        if self._space:
            found.append(self._space)
        self._held = self._space = ""
        return found

    def _advance(self, found: list[str | ToolCall], text: str) -> bool:
        """One move; False when more text is needed."""
        if self._at is _At.CALL:
            return self._read_call(found, text)
        if self._at is _At.BEHIND:
            return self._pass_closing()
        if self._at is _At.START:
            return self._begin()
        return self._read_words(found)

    def _begin(self) -> bool:
        rest = self._held.lstrip()
        if not rest or (_PYTHON_TAG.startswith(rest) and rest != _PYTHON_TAG):
            return False
        if rest.startswith(_PYTHON_TAG):
            self._held = rest.removeprefix(_PYTHON_TAG)
            return bool(self._held)
        self._at = _At.CALL if rest[0] in "{[" else _At.WORDS
        return True

    def _read_words(self, found: list[str | ToolCall]) -> bool:
        at = self._held.find(self._opening) if self._opening else -1
        if at >= 0:
            self._say(self._held[:at], found)
            self._held, self._at = self._held[at:], _At.CALL
            return True
        keep = _overlap(self._held, self._opening)
        self._say(self._held[: len(self._held) - keep], found)
        self._held = self._held[len(self._held) - keep :]
        return False

    def _read_call(self, found: list[str | ToolCall], text: str) -> bool:
        if "}" not in text and "]" not in text:
            return False  # nothing can have been completed
        body = self._held.removeprefix(self._opening)
        named = _NAMED.match(body) if self._has_names else None
        start = len(body) - len(body.lstrip()) if named is None else named.end()
        try:
            value, end = json.JSONDecoder().raw_decode(body, start)
        except (ValueError, RecursionError):
            return False
        calls = _calls_of(value if named is None else {"name": named[1], "arguments": value})
        if calls is None:
            self._say(self._held[: len(self._held) - len(body) + end], found)
            self._at = _At.WORDS
        else:
            for call in calls[: 1 - self.num_calls] if self._is_single else calls:
                found.append(call)
                self.num_calls += 1
            self._at, self._space, self._is_behind_call = _At.BEHIND, "", True
        self._held = body[end:]
        return bool(self._held)

    def _pass_closing(self) -> bool:
        rest = self._held.lstrip()
        if self._closing and rest.startswith(self._closing):
            rest = rest.removeprefix(self._closing)
        elif self._closing and self._closing.startswith(rest):
            return False  # the mark is still to come, or not all of it is here
        if self._has_separators:
            rest = rest.lstrip("; \n,")
            if not rest:
                return False
            self._at = _At.CALL if rest[0] == "{" else _At.WORDS
        else:
            self._at = _At.WORDS
        self._held = rest
        return bool(rest)

    def _say(self, words: str, found: list[str | ToolCall]) -> None:
        """Words; white space around calls is nobody's."""
        words = self._space + words
        if self._is_behind_call:
            words = words.lstrip()
        shown = words.rstrip()
        self._space = words[len(shown) :]
        if shown:
            found.append(shown)
            self._is_behind_call = False


def _overlap(text: str, mark: str) -> int:
    """How many of the last characters may be the beginning of the mark."""
    for count in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-count:]):
            return count
    return 0


def _calls_of(value: Any) -> list[ToolCall] | None:
    """The calls that a JSON value stands for; None: it is none."""
    values = value if isinstance(value, list) else [value]
    calls = []
    for each in values:
        if not isinstance(each, dict) or not isinstance(each.get("name"), str):
            return None
        arguments = each.get("arguments", each.get("parameters"))
        if arguments is None:
            return None
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(ToolCall(each["name"], text))
    return calls or None
