"""Choices of chats in OpenAI's words, whole or as chunks, with the tool calls that are read out of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from peft_serve.api import openai_words as words
from peft_serve.api.plan import Answer, Piece, Token
from peft_serve.api.tool_syntax import MARKS, CallReader, ToolCall, ToolSyntax
from peft_serve.core import FinishReason

Delta = dict[str, Any]
"""What a chunk adds to a message: `content`, or `tool_calls`."""


class Reader(Protocol):
    """Reads one answer, piece by piece."""

    def push(self, text: str) -> list[Delta]: ...

    def flush(self) -> list[Delta]: ...

    @property
    def calls_end_it(self) -> bool:
        """Whether the answer ends with a call that the model has decided on."""
        ...


@dataclass(slots=True)
class WordsReader:
    """An answer without tools."""

    calls_end_it: bool = False

    def push(self, text: str) -> list[Delta]:
        return [{"content": text}] if text else []

    def flush(self) -> list[Delta]:
        return []


@dataclass(slots=True)
class CallsReader:
    """An answer in which calls are written between or instead of words."""

    syntax: ToolSyntax
    is_single: bool
    new_id: Callable[[], str]
    _reader: CallReader = field(init=False)
    _num_calls: int = 0

    def __post_init__(self) -> None:
        self._reader = CallReader(self.syntax, is_single=self.is_single)

    @property
    def calls_end_it(self) -> bool:
        return self._num_calls > 0

    def push(self, text: str) -> list[Delta]:
        return [self._delta(found) for found in self._reader.push(text)]

    def flush(self) -> list[Delta]:
        return [self._delta(found) for found in self._reader.flush()]

    def _delta(self, found: str | ToolCall) -> Delta:
        if isinstance(found, str):
            return {"content": found}
        self._num_calls += 1
        return _call_delta(self._num_calls - 1, self.new_id(), found.name, found.arguments)


@dataclass(slots=True)
class ArgumentsReader:
    """An answer that is nothing but the arguments of one function, as they come.

    OpenAI says `stop` at its end: the model had no say in it.
    """

    name: str
    new_id: Callable[[], str]
    calls_end_it: bool = False
    _is_begun: bool = False

    def push(self, text: str) -> list[Delta]:
        if not self._is_begun:
            self._is_begun = True
            return [_call_delta(0, self.new_id(), self.name, text)]
        return [{"tool_calls": [{"index": 0, "function": {"arguments": text}}]}] if text else []

    def flush(self) -> list[Delta]:
        return []


def chat_choice(index: int, answer: Answer, reader: Reader, *, has_logprobs: bool) -> dict[str, Any]:
    """A choice of a whole chat completion."""
    choice = words.chat_choice(index, answer, has_logprobs=has_logprobs)
    deltas = [*reader.push(_marked(answer)), *reader.flush()]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    if not calls:
        return choice
    content = "".join(delta.get("content", "") for delta in deltas)
    for call in calls:
        del call["index"]
    choice["message"] |= {"content": content or None, "tool_calls": calls}
    return choice | {"finish_reason": _finish_reason(answer.reason, reader)}


class ChatChunks:
    """Choices of chunks: the role once, what is said as it comes, and the reason of the end by itself."""

    def __init__(self, *, has_logprobs: bool, make_reader: Callable[[], Reader]) -> None:
        self._has_logprobs = has_logprobs
        self._make_reader = make_reader
        self._readers: dict[int, Reader] = {}

    def __call__(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        choices = []
        reader = self._readers.get(index)
        if reader is None:
            reader = self._readers[index] = self._make_reader()
            choices.append(words.chat_delta(index, {"role": "assistant", "content": ""}))
        mark = _mark(piece.token) if isinstance(reader, CallsReader) else ""
        deltas = reader.push(mark + piece.text)
        if piece.answer is not None:
            deltas += reader.flush()
        tokens = self._told(piece.token)
        if tokens and not deltas:
            deltas = [{"content": ""}]
        for delta in deltas:
            choices.append(words.chat_delta(index, delta, tokens))
            tokens = [] if tokens else tokens
        if piece.answer is not None:
            reason = _finish_reason(piece.answer.reason, reader)
            choices.append(words.chat_delta(index, {}) | {"finish_reason": reason})
        return choices

    def _told(self, token: Token | None) -> list[Token] | None:
        has_token = self._has_logprobs and token is not None and not token.special
        return [token] if has_token and token is not None else None


def _finish_reason(reason: FinishReason, reader: Reader) -> str:
    is_cut = reason is FinishReason.LENGTH
    return "tool_calls" if reader.calls_end_it and not is_cut else words.FINISH_REASONS[reason]


def _call_delta(index: int, id_: str, name: str, arguments: str) -> Delta:
    function = {"name": name, "arguments": arguments}
    return {"tool_calls": [{"index": index, "id": id_, "type": "function", "function": function}]}


def _mark(token: Token | None) -> str:
    """The text of a special token that marks calls: it is not in the answer's text."""
    is_mark = token is not None and token.special and token.text.strip() in MARKS
    return token.text.strip() if is_mark and token is not None else ""


def _marked(answer: Answer) -> str:
    if not any(_mark(token) for token in answer.tokens):
        return answer.text
    return "".join(_mark(token) if token.special else token.text for token in answer.tokens)
