"""A transcript: an answer as it is written down, token by token, up to its first stop string.

Owns the decoding of one answer and what of it has been shown. Knows no engine and no request but its plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from peft_serve.api.plan import LOWEST_LOGPROB, Alternative, Plan, Token
from peft_serve.detokenizing import StopFinder

Top = Sequence[tuple[int, float]]
"""(id, log-probability), best first."""


class Transcript:
    """`take` every token; once `has_stopped`, the rest is no part of the answer."""

    def __init__(self, plan: Plan) -> None:
        self._codec = plan.codec
        self._has_stops = bool(plan.stops)
        self._keeps_stop = plan.keep_stop
        self._decoder = plan.codec.detokenizer(plan.request.prompt)
        self._stops = StopFinder(plan.stops, keep_stop=plan.keep_stop)
        self._decoded = ""  # all text so far
        self.tokens: list[Token] = []
        self.shown = ""  # the part of the text that has been shown

    @property
    def has_stopped(self) -> bool:
        """Whether a stop string has been found."""
        return self._stops.found is not None

    def take(self, id_: int, logprob: float | None, top: Top = (), *, is_last: bool) -> tuple[Token, str]:
        """The next token, and the text that can be shown with it: all of the rest, with the last one."""
        special = self._codec.is_special(id_)
        piece = self._decoder.push(id_)
        if is_last:
            piece += self._decoder.flush()
        before = len(self._decoded)
        self._decoded += piece
        text = self._stops.push(piece) if self._has_stops else piece
        if self.has_stopped and self._keeps_stop:
            piece = (self.shown + text)[before:]  # the answer ends with the stop string, and so does its last token
        if is_last and not self.has_stopped:
            text += self._stops.flush()
        token = Token(
            id=id_,
            text=self._codec.token_text(id_) if special else piece,
            logprob=None if logprob is None else finite(logprob),
            special=special,
            top=tuple(Alternative(i, self._codec.token_text(i), finite(p)) for i, p in top),
        )
        self.tokens.append(token)
        self.shown += text
        return token, text

    def flush(self) -> str:
        """The rest of the text, of an answer whose last token was not known to be the last."""
        rest = self._decoder.flush()
        text = (self._stops.push(rest) + self._stops.flush()) if self._has_stops else rest
        self.shown += text
        return text


def prompt_tokens(plan: Plan, logprobs: Sequence[float], tops: Sequence[Top]) -> tuple[Token, ...]:
    """The tokens of the (decoder's) prompt; nothing comes before the first one that could make it likely."""
    request, codec = plan.request, plan.codec
    ids = request.decoder_prompt or request.prompt
    decoder = codec.detokenizer(())
    tokens = []
    for place, (id_, logprob, top) in enumerate(zip(ids, (None, *logprobs), ((), *tops), strict=True)):
        piece = decoder.push(id_) + (decoder.flush() if place + 1 == len(ids) else "")
        special = codec.is_special(id_)
        tokens.append(
            Token(
                id=id_,
                text=codec.token_text(id_) if special else piece,
                logprob=None if logprob is None else finite(logprob),
                special=special,
                top=tuple(Alternative(i, codec.token_text(i), finite(p)) for i, p in top),
            )
        )
    return tuple(tokens)


def finite(logprob: float) -> float:
    """What JSON can say of a log-probability."""
    return max(logprob, LOWEST_LOGPROB) if not math.isnan(logprob) else LOWEST_LOGPROB
