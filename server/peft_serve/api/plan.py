"""What a caller asks and what is done for it: facts that pass between the routes, admission and generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from peft_serve.adapters.records import HeadFacts
from peft_serve.api.forms import Form
from peft_serve.api.naming import BASE_NAME
from peft_serve.api.served import Served
from peft_serve.api.tools import ToolUse
from peft_serve.core import FinishReason, Reading, Request
from peft_serve.text import Encoded, TextCodec

LOWEST_LOGPROB: Final = -9999.0
"""What is shown for minus infinity, which JSON cannot say (OpenAI's figure)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One input: text, token ids or the messages of a chat, and the adapter it is for."""

    adapter: str = BASE_NAME
    text: str | None = None
    pair: str | None = None  # a second text, or the context of a question
    is_question: bool = False
    ids: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    tools: ToolUse | None = None  # what the answer to messages may call

    @property
    def offered(self) -> tuple[Mapping[str, Any], ...]:
        """The tools, as a chat template wants them."""
        return () if self.tools is None else self.tools.offered


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How a family of routes differs where requests are made."""

    defaults: Mapping[str, Any] = field(default_factory=dict)  # parameters, below those of the adapter
    max_new_tokens: int | None = 20  # when nobody says; None: as many as there is room for
    keep_stop: bool = True  # whether the answer ends with the stop string or before it
    names: Mapping[str, str] = field(default_factory=dict)  # what the family calls a parameter
    add_special_tokens: bool = True

    def name(self, parameter: str) -> str:
        return self.names.get(parameter, parameter)


class Purpose(StrEnum):
    """What a call is for."""

    GENERATE = "generate"
    CLASSIFY = "classify"  # by a task head, or by scoring choices
    EMBED = "embed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One HTTP call: its inputs and what was said explicitly, in the words of `bodies.Parameters`.

    An ensemble asks each of its members for every input: the asks of one input stand side by side.
    """

    asks: tuple[Ask, ...]
    explicit: Mapping[str, Any]
    style: Style = field(default_factory=Style)
    num_answers: int = 1  # independent answers to each input
    num_logprobs: int | None = None  # None: no log-probabilities; 0: of the chosen tokens; n: and n alternatives
    purpose: Purpose = Purpose.GENERATE
    pooling: Reading = Reading.MEAN  # of an embedding
    cuts: bool = False  # an input that is too long for a reading is cut, not refused
    num_members: int = 1  # of the ensemble that answers each input
    prompt_logprobs: int | None = None  # not None: of the prompt's tokens too, and so many alternatives
    is_streamed: bool = False  # token by token, as they come
    form: Form | None = None  # what the answers are to look like
    tenant: str = ""  # whose it is; told by admission


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One request for the engine, and what its answer needs to know."""

    request: Request
    served: Served
    codec: TextCodec  # that reads the prompt and writes the answer
    prompt_text: str
    pair_text: str = ""  # the second text of a reading
    labels: tuple[str, ...] = ()  # of the request's choices, or of the head's outputs
    stops: tuple[str, ...] = ()
    keep_stop: bool = True
    full_text: bool = False  # the answer begins with the prompt
    num_answers: int = 1  # that are wanted of this one request
    head: HeadFacts | None = None  # what a reading for labels is read by
    encoded: Encoded | None = None  # where the tokens of a reading come from
    release: Callable[[], None] = lambda: None  # gives the adapter back; called once


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have been chosen."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of an answer. `text` is what it adds to the answer; a special token adds nothing."""

    id: int
    text: str
    logprob: float | None
    special: bool
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """One choice: the sum of its tokens' log-probabilities, and its share among the choices."""

    label: str
    score: float
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer. Times in seconds."""

    text: str
    tokens: tuple[Token, ...]
    reason: FinishReason
    scores: tuple[Score, ...] = ()
    num_prompt_tokens: int
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    queue_s: float
    ttft_s: float | None
    total_s: float
    rows: tuple[tuple[float, ...], ...] = ()  # what was read, of a request that generates nothing
    prompt_tokens: tuple[Token, ...] = ()  # with their log-probabilities, if they were asked for
    score: float | None = None  # of a beam search: the log-probability by which beams are compared
    others: tuple[Answer, ...] = ()  # that the same search found, the next best first

    @property
    def merit(self) -> float:
        """By which the best of several answers is chosen."""
        if self.score is not None:
            return self.score
        known = [t.logprob for t in self.tokens if t.logprob is not None]
        return sum(known) / len(known) if known else LOWEST_LOGPROB


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What a step adds: a token, the text that can be shown now, and at the end the whole answer."""

    token: Token | None
    text: str
    answer: Answer | None = None
