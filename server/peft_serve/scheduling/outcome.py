"""The outcome: what a step's results mean for the requests whose rows they are.

Appends drawn tokens, collects scores and readings, and ends the requests that are through. Rows of requests that
ended while the step ran are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator

from peft_serve.core import (
    AdapterId,
    Event,
    FinishReason,
    Reading,
    ReadingEvent,
    RequestState,
    Row,
    RowResult,
    ScoresEvent,
    StepResult,
    TokenEvent,
)
from peft_serve.errors import AdapterUnavailable, InvalidParameter
from peft_serve.scheduling.draft import Flight
from peft_serve.scheduling.limits import Limits
from peft_serve.scheduling.memory import Memory
from peft_serve.scheduling.residency import Residency
from peft_serve.scheduling.roster import Roster
from peft_serve.scheduling.tracked import Tracked


class Outcome:
    """Turns the end of a step into events."""

    def __init__(self, limits: Limits, roster: Roster, memory: Memory, residency: Residency) -> None:
        self._limits = limits
        self._roster = roster
        self._memory = memory
        self._residency = residency

    def commit(self, flight: Flight, result: StepResult) -> Iterator[Event]:
        """The step ran. An adapter that could not be installed fails its own requests."""
        for adapter, reason in result.failed_installs:
            yield from self._fail_install(adapter, reason)
        self._residency.confirm()
        for tracked, row, given in zip(flight.owners, flight.step.rows, result.rows, strict=True):
            assert (given.request, given.branch) == (row.request, row.branch), "results are not in row order"
            if tracked.state is RequestState.RUNNING:
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

    def _fail_install(self, adapter: AdapterId, reason: str) -> Iterator[Event]:
        for tracked in (*self._roster.running_on(adapter), *self._roster.queue.waiters(adapter)):
            error = AdapterUnavailable(f"adapter {adapter} could not be put on the device: {reason}")
            yield self._roster.finish(tracked, FinishReason.FAILED, error)
        self._residency.drop(adapter)

    def _commit_row(self, tracked: Tracked, row: Row, given: RowResult) -> Iterator[Event]:
        if row.branch:
            self._commit_branch(tracked, row, given)
        else:
            tracked.num_computed += len(row.tokens)
            self._memory.keep(tracked)
            if row.source:
                tracked.source_is_pending = False
        if tracked.request.reading is not None:
            yield from self._commit_reading(tracked, row, given)
        elif row.draw is not None:
            yield from self._commit_token(tracked, given)
        elif row.wanted:
            if not row.branch:
                self._commit_first_scores(tracked, given)
            yield from self._finish_if_scored(tracked)

    def _commit_token(self, tracked: Tracked, given: RowResult) -> Iterator[Event]:
        assert given.token is not None, f"request {tracked.id} drew no token"
        index = tracked.num_outputs
        tracked.tokens.append(given.token)
        self._roster.note_token(tracked)
        yield TokenEvent(
            request=tracked.request.id,
            index=index,
            token=given.token,
            logprob=given.logprob,
            top=given.top,
        )
        params = tracked.request.sampling
        if given.token in tracked.request.eos_ids and not params.ignore_eos:
            yield self._roster.finish(tracked, FinishReason.EOS)
        elif index + 1 >= params.max_new_tokens or tracked.num_placed >= self._limits.max_context:
            yield self._roster.finish(tracked, FinishReason.LENGTH)

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
