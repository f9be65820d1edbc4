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
from dataclasses import replace

from peft_serve.api.plan import Answer, Piece, Plan, Score, Token
from peft_serve.api.problems import IncompleteGeneration
from peft_serve.api.transcript import Transcript, finite, prompt_tokens
from peft_serve.core import (
    BeamsEvent,
    Continuation,
    FinishEvent,
    FinishReason,
    PromptEvent,
    ReadingEvent,
    ScoresEvent,
    TokenEvent,
)
from peft_serve.engine.client import EngineClient, EventStream
from peft_serve.errors import Internal, ServeError
from peft_serve.metrics import Metrics, RequestFigures

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
        on_end: Callable[[RequestFigures], None],
    ) -> None:
        """`on_end` is told once what it came to."""
        self.plan = plan
        self._on_end = on_end
        self._stream = stream
        self._client = client
        self._codec = plan.codec
        self._metrics = metrics
        self._clock = clock
        self._start_s = clock()
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._transcript = Transcript(plan)
        self._found: tuple[Continuation, ...] = ()  # by beam search, the best first; the transcript is of that one
        self._scores: tuple[Score, ...] = ()
        self._rows: tuple[tuple[float, ...], ...] = ()
        self.prompt_tokens: tuple[Token, ...] = ()  # with their log-probabilities, if they were asked for
        self._is_closed = False
        self.figures: RequestFigures | None = None  # what it came to, once it has ended

    @property
    def start_s(self) -> float:
        """When it was submitted, on the server's clock."""
        return self._start_s

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
        self._observe("cancelled", FinishReason.CANCELLED.value, self._num_prompt(), None)

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
                    if self._transcript.has_stopped:
                        continue  # a step was under way when the stop string was found
                    is_last = self._is_last(event)
                    token, text = self._transcript.take(event.token, event.logprob, event.top, is_last=is_last)
                    if self._transcript.has_stopped:
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
                elif isinstance(event, PromptEvent):
                    self.prompt_tokens = prompt_tokens(self.plan, event.logprobs, event.tops)
                elif isinstance(event, BeamsEvent):
                    self._found = event.continuations
                    self._transcript = written(self.plan, self._found[0])
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
        return is_eos or event.is_last or event.index + 1 >= sampling.max_new_tokens

    def _take_scores(self, event: ScoresEvent) -> Token:
        """The tokens of the likeliest choice. The one that is shown stands for the whole choice."""
        sums = event.logprobs
        shares = softmax(sums)
        order = sorted(range(len(sums)), key=lambda i: -sums[i])
        best = order[0]
        labels = self.plan.labels
        self._scores = tuple(Score(labels[i], shares[i], finite(sums[i])) for i in order)
        for id_, logprob in zip(self.plan.request.choices[best], event.token_logprobs[best], strict=True):
            special = self._codec.is_special(id_)
            text = self._codec.token_text(id_)
            self._transcript.tokens.append(Token(id=id_, text=text, logprob=finite(logprob), special=special))
        self._transcript.shown = labels[best]
        first = self.plan.request.choices[best][0]
        return Token(id=first, text=labels[best], logprob=finite(sums[best]), special=False)

    def _conclude(self, finish: FinishEvent, token: Token | None, text: str) -> Piece:
        found_stop = self._transcript.has_stopped
        reason = FinishReason.STOP if found_stop else FinishReason.EOS if self._scores else finish.reason
        outcome = "ok" if found_stop or self._scores else _outcome(finish)
        num_prompt = finish.num_prompt_tokens or self._num_prompt()
        self._observe(outcome, _reason_label(reason), num_prompt, finish)
        if outcome in ("failed", "refused"):
            raise _blame(finish)
        if outcome == "cancelled":
            raise IncompleteGeneration("the server ended this request before it was complete; send it again")
        if token is None and not self._found:  # an end that no token announced
            text = self._transcript.flush()
        answer = Answer(
            text=self._transcript.shown,
            tokens=tuple(self._transcript.tokens),
            reason=reason,
            prompt_tokens=self.prompt_tokens,
            score=self._found[0].score if self._found else None,
            scores=self._scores,
            num_prompt_tokens=num_prompt,
            num_cached_tokens=finish.num_cached_tokens,
            queue_s=finish.queue_s,
            ttft_s=self.ttft_s,
            total_s=self._clock() - self._start_s,
            rows=self._rows,
        )
        others = tuple(self._other(each, answer) for each in self._found[1:])
        return Piece(token=token, text=text, answer=replace(answer, others=others))

    def _other(self, found: Continuation, best: Answer) -> Answer:
        """The answer that another beam makes."""
        transcript = written(self.plan, found)
        return replace(
            best,
            text=transcript.shown,
            tokens=tuple(transcript.tokens),
            reason=FinishReason.STOP if transcript.has_stopped else _end_of(found),
            score=found.score,
        )

    def _num_prompt(self) -> int:
        return len(self.plan.request.prompt)

    def _note_time(self, event: object) -> None:
        if isinstance(event, PromptEvent):
            return
        now = self._clock()
        if isinstance(event, TokenEvent) and self._last_s is not None:
            self._metrics.observe_inter_token(now - self._last_s)
        if self._first_s is None and not isinstance(event, FinishEvent):
            self._first_s = now
        self._last_s = now

    def _observe(self, outcome: str, reason: str, num_prompt: int, finish: FinishEvent | None) -> None:
        if self.figures is not None:
            return
        self.figures = RequestFigures(
            adapter=self.plan.served.name,
            method=self.plan.served.method,
            outcome=outcome,
            finish_reason=reason,
            num_prompt_tokens=num_prompt,
            num_output_tokens=len(self._transcript.tokens),
            num_cached_tokens=0 if finish is None else finish.num_cached_tokens,
            queue_s=0.0 if finish is None else finish.queue_s,
            load_s=0.0 if finish is None else finish.load_s,
            ttft_s=self.ttft_s,
            e2e_s=self._clock() - self._start_s,
        )
        self._metrics.observe_request(self.figures)
        self._metrics.tenants.observe_request(
            self.plan.request.tenant,
            outcome,
            num_prompt_tokens=num_prompt,
            num_output_tokens=self.figures.num_output_tokens,
        )
        self._on_end(self.figures)


def softmax(sums: Sequence[float]) -> list[float]:
    """Shares of a whole from log-probabilities; even shares if none of them is possible."""
    top = max(sums)
    if not math.isfinite(top):
        return [1.0 / len(sums)] * len(sums)
    weights = [math.exp(each - top) for each in sums]
    whole = sum(weights)
    return [weight / whole for weight in weights]


def _outcome(finish: FinishEvent) -> str:
    """`failed` is the server's doing; what was refused once it waited, as by its own limit of time, is not."""
    if finish.reason is FinishReason.FAILED and isinstance(finish.error, ServeError) and finish.error.status < 500:
        return "refused"
    return _OUTCOMES.get(finish.reason, "ok")


def _blame(finish: FinishEvent) -> ServeError:
    if isinstance(finish.error, ServeError):
        return finish.error
    return Internal("the request failed on the server's side; others were not affected")


def _reason_label(reason: FinishReason) -> str:
    return "length" if reason is FinishReason.LENGTH else "stop"


def written(plan: Plan, found: Continuation) -> Transcript:
    """A beam as an answer, cut behind the first stop string in it."""
    transcript = Transcript(plan)
    last = len(found.tokens) - 1
    for place, (id_, logprob, top) in enumerate(zip(found.tokens, found.logprobs, found.tops, strict=True)):
        transcript.take(id_, logprob, top, is_last=place == last)
        if transcript.has_stopped:
            break
    return transcript


def _end_of(found: Continuation) -> FinishReason:
    return FinishReason.EOS if found.is_ended else FinishReason.LENGTH
