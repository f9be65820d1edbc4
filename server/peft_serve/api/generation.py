"""One request from its first event to its answer.

Owns the request's event stream, its decoding and its adapter's retention, and gives all of it back once, however
it ends. Knows no HTTP.

The engine's last token and its end come as two events. Whether a token is the last can be told beforehand (end of
sequence, length, a stop string), and then both make one piece, so that a stream has one event for each token and
no token waits for the next.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Sequence

from peft_serve.api.plan import LOWEST_LOGPROB, Alternative, Answer, Piece, Plan, Score, Token
from peft_serve.api.problems import IncompleteGeneration
from peft_serve.core import FinishEvent, FinishReason, ReadingEvent, ScoresEvent, TokenEvent
from peft_serve.engine.client import EngineClient, EventStream
from peft_serve.errors import Internal, ServeError
from peft_serve.metrics import Metrics, RequestFigures
from peft_serve.text import StopFinder

_OUTCOMES = {FinishReason.CANCELLED: "cancelled", FinishReason.FAILED: "failed"}


class Generation:
    """Iterate over `pieces()` once; `close()` at the end, or at any time before."""

    def __init__(
        self,
        plan: Plan,
        stream: EventStream,
        *,
        client: EngineClient,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self.plan = plan
        self._stream = stream
        self._client = client
        self._codec = plan.codec
        self._metrics = metrics
        self._clock = clock
        self._start_s = clock()
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._decoder = plan.codec.detokenizer(plan.request.prompt)
        self._stops = StopFinder(plan.stops, keep_stop=plan.keep_stop)
        self._tokens: list[Token] = []
        self._decoded = ""  # all text so far
        self._shown = ""  # the part of it that has been shown
        self._scores: tuple[Score, ...] = ()
        self._rows: tuple[tuple[float, ...], ...] = ()
        self._is_closed = False
        self._is_observed = False

    @property
    def ttft_s(self) -> float | None:
        """Seconds from submission to the first event."""
        return None if self._first_s is None else self._first_s - self._start_s

    def close(self) -> None:
        """Idempotent. A request that has not ended is cancelled."""
        if self._is_closed:
            return
        self._is_closed = True
        self._stream.close()
        self.plan.release()
        self._observe("cancelled", FinishReason.CANCELLED.value, self._num_prompt(), 0.0)

    async def answer(self) -> Answer:
        """The whole answer; raises what the request failed with."""
        async for piece in self.pieces():
            if piece.answer is not None:
                return piece.answer
        raise Internal("the request ended without an answer")

    async def pieces(self) -> AsyncIterator[Piece]:
        """What each step adds, the last with the answer; raises what the request failed with."""
        try:
            async for event in self._stream:
                self._note_time(event)
                if isinstance(event, TokenEvent):
                    if self._stops.found is not None:
                        continue  # a step was under way when the stop string was found
                    is_last = self._is_last(event)
                    token, text = self._take(event)
                    if self._stops.found is not None:
                        self._client.stop(self.plan.request.id, FinishReason.STOP)
                        is_last = True
                    if is_last:
                        finish = await self._finish()
                        yield self._conclude(finish, token, text)
                        return
                    yield Piece(token=token, text=text)
                elif isinstance(event, ScoresEvent):
                    token = self._take_scores(event)
                    yield self._conclude(await self._finish(), token, token.text)
                    return
                elif isinstance(event, ReadingEvent):
                    self._rows = event.rows
                elif isinstance(event, FinishEvent):
                    yield self._conclude(event, None, "")
                    return
        finally:
            self.close()

    async def _finish(self) -> FinishEvent:
        """The end of the request; tokens that come before it were drawn after the answer's end."""
        async for event in self._stream:
            if isinstance(event, FinishEvent):
                return event
        raise IncompleteGeneration("the server gave this request up before it was complete; send it again")

    def _is_last(self, event: TokenEvent) -> bool:
        sampling = self.plan.request.sampling
        is_eos = event.token in self.plan.request.eos_ids and not sampling.ignore_eos
        return is_eos or event.index + 1 >= sampling.max_new_tokens

    def _take(self, event: TokenEvent) -> tuple[Token, str]:
        """The token of an event, and the text that can be shown with it."""
        special = self._codec.is_special(event.token)
        piece = self._decoder.push(event.token)
        if self._is_last(event):
            piece += self._decoder.flush()
        token, text = self._shown_with(event, piece, special=special)
        if self._is_last(event) and self._stops.found is None:
            text += self._stops.flush()
        self._tokens.append(token)
        self._shown += text
        return token, text

    def _shown_with(self, event: TokenEvent, piece: str, *, special: bool) -> tuple[Token, str]:
        before = len(self._decoded)
        self._decoded += piece
        text = self._stops.push(piece) if self.plan.stops else piece
        if self._stops.found is not None and self.plan.keep_stop:
            piece = (self._shown + text)[before:]  # the answer ends with the stop string, and so does its last token
        return (
            Token(
                id=event.token,
                text=self._codec.token_text(event.token) if special else piece,
                logprob=_shown_logprob(event.logprob),
                special=special,
                top=tuple(Alternative(i, self._codec.token_text(i), _finite(p)) for i, p in event.top),
            ),
            text,
        )

    def _take_scores(self, event: ScoresEvent) -> Token:
        """The tokens of the likeliest choice. The one that is shown stands for the whole choice."""
        sums = event.logprobs
        shares = softmax(sums)
        order = sorted(range(len(sums)), key=lambda i: -sums[i])
        best = order[0]
        labels = self.plan.labels
        self._scores = tuple(Score(labels[i], shares[i], _finite(sums[i])) for i in order)
        for id_, logprob in zip(self.plan.request.choices[best], event.token_logprobs[best], strict=True):
            special = self._codec.is_special(id_)
            text = self._codec.token_text(id_)
            self._tokens.append(Token(id=id_, text=text, logprob=_finite(logprob), special=special))
        self._shown = labels[best]
        first = self.plan.request.choices[best][0]
        return Token(id=first, text=labels[best], logprob=_finite(sums[best]), special=False)

    def _conclude(self, finish: FinishEvent, token: Token | None, text: str) -> Piece:
        found_stop = self._stops.found is not None
        reason = FinishReason.STOP if found_stop else FinishReason.EOS if self._scores else finish.reason
        outcome = "ok" if found_stop or self._scores else _OUTCOMES.get(finish.reason, "ok")
        num_prompt = finish.num_prompt_tokens or self._num_prompt()
        self._observe(outcome, _reason_label(reason), num_prompt, finish.queue_s, finish.num_cached_tokens)
        if outcome == "failed":
            raise _blame(finish)
        if outcome == "cancelled":
            raise IncompleteGeneration("the server ended this request before it was complete; send it again")
        if token is None:  # an end that no token announced
            rest = self._decoder.flush()
            text = (self._stops.push(rest) + self._stops.flush()) if self.plan.stops else rest
            self._shown += text
        answer = Answer(
            text=self._shown,
            tokens=tuple(self._tokens),
            reason=reason,
            scores=self._scores,
            num_prompt_tokens=num_prompt,
            num_cached_tokens=finish.num_cached_tokens,
            queue_s=finish.queue_s,
            ttft_s=self.ttft_s,
            total_s=self._clock() - self._start_s,
            rows=self._rows,
        )
        return Piece(token=token, text=text, answer=answer)

    def _num_prompt(self) -> int:
        return len(self.plan.request.prompt)

    def _note_time(self, event: object) -> None:
        now = self._clock()
        if isinstance(event, TokenEvent) and self._last_s is not None:
            self._metrics.observe_inter_token(now - self._last_s)
        if self._first_s is None and not isinstance(event, FinishEvent):
            self._first_s = now
        self._last_s = now

    def _observe(self, outcome: str, reason: str, num_prompt: int, queue_s: float, num_cached: int = 0) -> None:
        if self._is_observed:
            return
        self._is_observed = True
        self._metrics.observe_request(
            RequestFigures(
                adapter=self.plan.served.name,
                method=self.plan.served.method,
                outcome=outcome,
                finish_reason=reason,
                num_prompt_tokens=num_prompt,
                num_output_tokens=len(self._tokens),
                num_cached_tokens=num_cached,
                queue_s=queue_s,
                ttft_s=self.ttft_s,
                e2e_s=self._clock() - self._start_s,
            )
        )


def softmax(sums: Sequence[float]) -> list[float]:
    """Shares of a whole from log-probabilities; even shares if none of them is possible."""
    top = max(sums)
    if not math.isfinite(top):
        return [1.0 / len(sums)] * len(sums)
    weights = [math.exp(each - top) for each in sums]
    whole = sum(weights)
    return [weight / whole for weight in weights]


def _blame(finish: FinishEvent) -> ServeError:
    if isinstance(finish.error, ServeError):
        return finish.error
    return Internal("the request failed on the server's side; others were not affected")


def _reason_label(reason: FinishReason) -> str:
    return "length" if reason is FinishReason.LENGTH else "stop"


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB) if not math.isnan(logprob) else LOWEST_LOGPROB


def _shown_logprob(logprob: float | None) -> float | None:
    return None if logprob is None else _finite(logprob)
