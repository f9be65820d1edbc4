"""The outcome: what a step's results mean for the requests whose rows they are.

Appends drawn tokens, collects scores and readings, and ends the requests that are through. Rows of requests that
ended while the step ran are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from peft_serve.core import (
    AdapterId,
    BeamsEvent,
    Draw,
    Event,
    FinishReason,
    PromptEvent,
    Reading,
    ReadingEvent,
    RequestState,
    Row,
    RowResult,
    ScoresEvent,
    StepResult,
    TokenEvent,
)
from peft_serve.errors import AdapterUnavailable, Internal, InvalidParameter, ServeError
from peft_serve.scheduling.beams import Given, begin_search
from peft_serve.scheduling.draft import Flight
from peft_serve.scheduling.limits import Limits
from peft_serve.scheduling.memory import Memory
from peft_serve.scheduling.residency import Residency
from peft_serve.scheduling.roster import Roster
from peft_serve.scheduling.tracked import Tracked

_RETRY_S: Final = 1.0  # memory comes back as others end


class Outcome:
    """Turns the end of a step into events."""

    def __init__(
        self, limits: Limits, roster: Roster, memory: Memory, residency: Residency, clock: Callable[[], float]
    ) -> None:
        self._limits = limits
        self._roster = roster
        self._memory = memory
        self._residency = residency
        self._clock = clock

    def commit(self, flight: Flight, result: StepResult) -> Iterator[Event]:
        """The step ran. An adapter that could not be installed fails its own requests."""
        for adapter, reason in result.failed_installs:
            yield from self._fail_install(adapter, reason, is_short=result.was_short_of_memory)
        self._residency.confirm()
        for tracked, row, given in zip(flight.owners, flight.step.rows, result.rows, strict=True):
            assert (given.request, given.branch) == (row.request, row.branch), "results are not in row order"
            if tracked.state is not RequestState.RUNNING:
                continue
            if given.failure is not None:
                self._memory.distrust(tracked)
                yield self._roster.finish(tracked, FinishReason.FAILED, given.failure)
            else:
                yield from self._commit_row(tracked, row, given)

    def abandon(self, flight: Flight, error: Exception) -> Iterator[Event]:
        """The step raised: the requests with a row in it fail, and the slots it was to change are emptied."""
        for tracked in flight.owners:
            if tracked.state is RequestState.RUNNING:
                yield self._roster.finish(tracked, FinishReason.FAILED, error)
        for install in flight.step.installs:
            # a request may have been started on the adapter without a row in this step
            for tracked in self._roster.running_on(install.adapter):
                self._roster.preempt(tracked)
        self._residency.undo(flight.step)

    def _fail_install(self, adapter: AdapterId, reason: str, *, is_short: bool) -> Iterator[Event]:
        for tracked in (*self._roster.running_on(adapter), *self._roster.queue.waiters(adapter)):
            told = f"adapter {adapter} could not be put on the device: {reason}"
            error = AdapterUnavailable(told, retry_after_s=_RETRY_S if is_short else None)
            yield self._roster.finish(tracked, FinishReason.FAILED, error)
        self._residency.drop(adapter)

    def _commit_row(self, tracked: Tracked, row: Row, given: RowResult) -> Iterator[Event]:
        if row.branch and tracked.search is not None:
            yield from self._commit_beam(tracked, row, given)
            return
        if row.branch:
            self._commit_branch(tracked, row, given)
        else:
            tracked.num_computed += len(row.tokens)
            self._memory.keep(tracked)
            if row.source:
                tracked.source_is_pending = False
        if tracked.wants_prompt:
            yield from self._commit_prompt(tracked, given)
        if tracked.request.reading is not None:
            yield from self._commit_reading(tracked, row, given)
        elif row.draw is not None and row.draw.num_candidates:
            tracked.search = begin_search(tracked.request, max_new_tokens=self._memory.max_new_tokens(tracked))
            yield from self._search_on(tracked, [given])
        elif row.draw is not None:
            yield from self._commit_token(tracked, row.draw, given)
        elif tracked.is_prompt_told and tracked.request.sampling.max_new_tokens == 0:
            yield self._roster.finish(tracked, FinishReason.LENGTH)
        elif row.wanted and tracked.request.choices:
            if not row.branch:
                self._commit_first_scores(tracked, given)
            yield from self._finish_if_scored(tracked)

    def _commit_token(self, tracked: Tracked, draw: Draw, given: RowResult) -> Iterator[Event]:
        assert given.token is not None, f"request {tracked.id} drew no token"
        index = tracked.num_outputs
        tracked.tokens.append(given.token)
        self._roster.note_token(tracked)
        end = self._end_with(tracked, given.token)
        yield TokenEvent(
            request=tracked.request.id,
            index=index,
            token=given.token,
            logprob=given.logprob,
            top=given.top,
            is_last=end is not None,
        )
        if end is not None:
            yield self._roster.finish(tracked, end)
        elif draw.allowed is not None and draw.forced is None:  # what the base insists on is no part of a grammar
            yield from self._follow(tracked, given.token)

    def _end_with(self, tracked: Tracked, token: int) -> FinishReason | None:
        """Why the answer ends with this token, its last one; None if it does not."""
        params = tracked.request.sampling
        if token in tracked.request.eos_ids and not params.ignore_eos:
            return FinishReason.EOS
        is_long = tracked.num_outputs >= params.max_new_tokens or tracked.num_placed >= self._limits.max_context
        return FinishReason.LENGTH if is_long or self._is_time_up(tracked) else None

    def _follow(self, tracked: Tracked, token: int) -> Iterator[Event]:
        """A constrained answer goes on, unless its constraint breaks, or has no token to say that it is complete."""
        try:
            tracked.follow(token)
        except Exception as error:  # noqa: BLE001  # whatever it is, the other rows have nothing to do with it
            failure = error if isinstance(error, ServeError) else Internal("the answer's grammar could not be followed")
            yield self._roster.finish(tracked, FinishReason.FAILED, failure)
            return
        if tracked.is_complete and (tracked.request.sampling.ignore_eos or not tracked.request.eos_ids):
            yield self._roster.finish(tracked, FinishReason.EOS)

    def _is_time_up(self, tracked: Tracked) -> bool:
        longest_s, first_s = tracked.request.max_time_s, tracked.first_step_s
        return longest_s is not None and first_s is not None and self._clock() - first_s >= longest_s

    def _commit_prompt(self, tracked: Tracked, given: RowResult) -> Iterator[Event]:
        """Log-probabilities of the prompt come chunk by chunk and are told at its end."""
        tops = given.score_tops or ((),) * len(given.scores)
        for scores, top in zip(given.scores, tops, strict=True):
            tracked.prompt_scores.extend(scores)
            tracked.prompt_tops.extend(top for _ in scores)
        if tracked.num_computed >= tracked.num_prompt:
            assert len(tracked.prompt_scores) == tracked.num_prompt - 1, "a token of the prompt has no log-probability"
            tracked.is_prompt_told = True
            yield PromptEvent(
                request=tracked.id, logprobs=tuple(tracked.prompt_scores), tops=tuple(tracked.prompt_tops)
            )

    def _commit_beam(self, tracked: Tracked, row: Row, given: RowResult) -> Iterator[Event]:
        """The search goes on when all of its beams have been computed."""
        beam = tracked.beams[row.branch - 1]
        beam.num_computed += len(row.tokens)
        if row.draw is None:
            return
        beam.given = given
        self._roster.note_token(tracked)
        results = [each.given for each in tracked.beams if each.given is not None]
        if len(results) == len(tracked.beams):
            yield from self._search_on(tracked, results)

    def _search_on(self, tracked: Tracked, results: Sequence[RowResult]) -> Iterator[Event]:
        search = tracked.search
        assert search is not None, f"request {tracked.id} has no search"
        search.advance([Given(each.candidates, each.top) for each in results], is_last=self._is_time_up(tracked))
        if not search.is_over:
            self._memory.regroup(tracked)
            return
        best = search.best(tracked.request.sampling.num_sequences)
        if not best:
            error = Internal(f"{tracked.adapter} gives no number that a search can go by; the answer was not completed")
            yield self._roster.finish(tracked, FinishReason.FAILED, error)
            return
        yield BeamsEvent(request=tracked.id, continuations=best)
        yield self._roster.finish(tracked, FinishReason.EOS if best[0].is_ended else FinishReason.LENGTH)

    def _commit_reading(self, tracked: Tracked, row: Row, given: RowResult) -> Iterator[Event]:
        if row.reading is not None and not given.readings:
            error = InvalidParameter(f"{tracked.adapter} has no head for the reading '{row.reading}', nor has its base")
            yield self._roster.finish(tracked, FinishReason.FAILED, error)
            return
        if row.reading is Reading.MEAN:
            tracked.readings[:] = [_joint_mean(tracked, row, given.readings[0])]
        else:
            tracked.readings.extend(given.readings)
        if tracked.is_read:
            yield ReadingEvent(request=tracked.request.id, rows=tuple(tracked.readings))
            yield self._roster.finish(tracked, FinishReason.READ)

    def _commit_branch(self, tracked: Tracked, row: Row, given: RowResult) -> None:
        index = row.branch - 1
        branch = tracked.branches[index]
        branch.num_computed += len(row.tokens)
        branch.scores.extend(scores[0] for scores in given.scores)
        if branch.num_left == 0:
            tracked.scored[index] = tuple(branch.scores)
            self._memory.close_branch(tracked, index)

    def _commit_first_scores(self, tracked: Tracked, given: RowResult) -> None:
        """The scores of each choice's first token, given by the last token of the prompt."""
        tracked.first_scores = given.scores[0]
        for index, choice in enumerate(tracked.request.choices):
            if len(choice) == 1:
                tracked.scored[index] = ()

    def _finish_if_scored(self, tracked: Tracked) -> Iterator[Event]:
        if len(tracked.scored) < len(tracked.request.choices):
            return
        scores = tuple((first, *tracked.scored[i]) for i, first in enumerate(tracked.first_scores))
        yield ScoresEvent(
            request=tracked.request.id,
            logprobs=tuple(sum(each) for each in scores),
            token_logprobs=scores,
        )
        yield self._roster.finish(tracked, FinishReason.EOS)


def _joint_mean(tracked: Tracked, row: Row, mean: tuple[float, ...]) -> tuple[float, ...]:
    """The mean over all tokens so far, of the mean over those before the row and that over the row's."""
    if not tracked.readings:
        return mean
    num_all, num_new = tracked.num_computed, len(row.tokens)
    before = tracked.readings[0]
    return tuple((a * (num_all - num_new) + b * num_new) / num_all for a, b in zip(before, mean, strict=True))
