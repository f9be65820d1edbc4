"""A draft: one step while it is being planned, with what is left of its budgets.

It turns requests into rows; which requests, and in which order, is the planner's business. A token of each row that
decodes is always in it. Parts of prompts are as long as `max_step_tokens` allows, and where the time of a step is known
by now (see `step_time`) no longer than `max_step_s` does: everybody else's next token waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from peft_serve.core import BASE, AdapterId, Draw, Install, Reading, Request, Row, Step
from peft_serve.scheduling.beams import num_candidates
from peft_serve.scheduling.limits import Limits
from peft_serve.scheduling.step_time import StepLoad, StepTimeModel
from peft_serve.scheduling.tracked import Branch, Tracked

MAX_SCORED: Final = 256
"""Prompt tokens of one step whose log-probabilities are wanted: each costs the logits of the whole vocabulary."""

SHORTEST_PART: Final = 16
"""Tokens of prompts that a step has at least, however long it takes, and no fewer than tokens of those that decode: a
server whose steps are long without any prompt still reads half of the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """A step on its way through the model, and whose each row is."""

    step: Step
    owners: tuple[Tracked, ...]  # parallel to step.rows
    load: StepLoad


class StepDraft:
    """Rows, copies and budgets of one step."""

    def __init__(self, limits: Limits, step_id: int, steps: StepTimeModel) -> None:
        self._limits = limits
        self._steps = steps
        self._token_s = 0.0 if limits.max_step_s is None or limits.is_encoder else steps.coefficients["token"]
        self._step_id = step_id
        self._rows: list[tuple[int, int, int, Row, Tracked]] = []
        self._copies: list[tuple[int, int]] = []
        self._ranks: dict[AdapterId, int] = {}
        self._num_tokens = 0
        self._num_positions = 0
        self._num_scored = 0
        self._num_of_prompts = 0  # of these tokens
        self._has_source = False

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def tokens_left(self) -> int:
        return self._limits.max_step_tokens - self._num_tokens

    @property
    def prompt_tokens_left(self) -> int:
        """Tokens that the step has room and time for."""
        limit_s, each_s = self._limits.max_step_s, self._token_s
        if limit_s is None or each_s <= 0:
            return self.tokens_left
        spare_s = limit_s - self._steps.predict(self._load())
        least = max(SHORTEST_PART, self._num_tokens - self._num_of_prompts) - self._num_of_prompts
        return min(self.tokens_left, max(0, least, int(spare_s / each_s)))

    @property
    def is_full(self) -> bool:
        """Whether the step takes no further row."""
        return self.tokens_left <= 0 or len(self._rows) >= self._limits.max_rows

    def carries(self, adapter: AdapterId) -> bool:
        """Whether the adapter costs the step nothing more: it is in the step, or the base."""
        return adapter == BASE or adapter in self._ranks

    def allows(self, adapter: AdapterId, rank: int) -> bool:
        """Whether the adapter fits the step's budget of adapters and ranks. The first one always does."""
        if not self._ranks or self.carries(adapter):
            return True
        if len(self._ranks) >= self._limits.max_step_adapters:
            return False
        return sum(self._ranks.values()) + rank <= self._limits.max_step_rank

    def join(self, adapter: AdapterId, rank: int) -> None:
        """Spend the budget on the adapter."""
        if adapter != BASE:
            self._ranks[adapter] = rank

    def has_tokens_for(self, tracked: Tracked) -> bool:
        """Whether the request's next row fits; a source always fits as the step's first one."""
        if self.is_full or self.prompt_tokens_left <= 0:
            return False
        if not tracked.source_is_pending or not self._has_source:
            return True
        return len(tracked.request.prompt) < self.prompt_tokens_left

    def room_for(self, num_tokens: int) -> int:
        """What the part of a prompt leaves to the next one, which wants so many tokens: half of the room at most."""
        return 0 if self._limits.is_encoder else min(num_tokens, self.prompt_tokens_left // 2)

    def add_row(self, tracked: Tracked, *, leaves: int = 0) -> None:
        """The request's next row: as much of its tokens as the step has room for, one at least.

        A prompt `leaves` so many tokens of that room to others, unless it is an encoder's, which is read whole.
        """
        source = tracked.request.prompt if tracked.source_is_pending else ()
        start = tracked.num_computed
        room = (self.tokens_left if tracked.is_decoding else self.prompt_tokens_left - leaves) - len(source)
        if tracked.wants_prompt:
            room = min(room, MAX_SCORED - self._num_scored)
        num_tokens = min(len(tracked.tokens) - start, max(1, room))
        end = start + num_tokens
        is_last = end == len(tracked.tokens)
        choices = tracked.request.choices
        row = Row(
            request=tracked.request.id,
            slot=_slot_of(tracked),
            tokens=tuple(tracked.tokens[start:end]),
            start=tracked.prefix + start,
            blocks=tracked.table,
            draw=_draw(tracked) if is_last and _has_draw(tracked) else None,
            wanted=(tuple(choice[0] for choice in choices),) if is_last and choices else _wanted(tracked, start, end),
            num_wanted_top=(tracked.request.prompt_logprobs or 0) if tracked.wants_prompt else 0,
            source=source,
            cross_blocks=tracked.cross_blocks,
            num_source=tracked.num_source,
            num_unplaced=tracked.num_unplaced,
            active_from=tracked.active_from,
            prompt=tracked.prompt_positions,
            reading=_reading(tracked.request, is_first=start == 0, is_last=is_last),
            segments=tracked.request.segments if source else tracked.request.segments[start:end],
        )
        self._append(tracked, row, num_tokens + len(source))
        self._num_scored += len(row.wanted) if tracked.wants_prompt else 0
        self._has_source = self._has_source or bool(source)
        self._num_of_prompts += 0 if tracked.is_decoding else num_tokens + len(source)
        self._copies.extend(tracked.copies)
        tracked.copies = ()

    def add_branch_row(self, tracked: Tracked, index: int) -> None:
        """The next row of one of the request's choices."""
        branch: Branch = tracked.branches[index]
        done = branch.num_computed
        end = done + min(branch.num_left, self.tokens_left)
        row = Row(
            request=tracked.request.id,
            slot=_slot_of(tracked),
            tokens=branch.choice[done:end],
            start=tracked.num_positions + done,
            blocks=branch.blocks,
            wanted=tuple((token,) for token in branch.choice[done + 1 : end + 1]),
            branch=index + 1,
            cross_blocks=tracked.cross_blocks,
            num_source=tracked.num_source,
            num_unplaced=tracked.num_unplaced,
            active_from=tracked.active_from,
            prompt=tracked.prompt_positions,
        )
        self._append(tracked, row, end - done)
        self._copies.extend(branch.copies)
        branch.copies = ()

    def add_beam_row(self, tracked: Tracked, index: int) -> None:
        """The next row of one of the beams of the request's search."""
        beam = tracked.beams[index]
        done = beam.num_computed
        end = done + min(beam.num_left, self.tokens_left)
        row = Row(
            request=tracked.request.id,
            slot=_slot_of(tracked),
            tokens=beam.tokens[done:end],
            start=tracked.num_positions + done,
            blocks=beam.blocks,
            draw=_draw_behind(tracked, beam.tokens) if end == len(beam.tokens) else None,
            branch=index + 1,
            cross_blocks=tracked.cross_blocks,
            num_source=tracked.num_source,
            num_unplaced=tracked.num_unplaced,
            active_from=tracked.active_from,
            prompt=tracked.prompt_positions,
        )
        self._append(tracked, row, end - done)
        self._copies.extend(beam.copies)
        beam.copies = ()

    def seal(self, removes: tuple[int, ...], installs: tuple[Install, ...]) -> Flight:
        """The finished step, rows sorted by slot and then by arrival."""
        rows = sorted(self._rows, key=lambda entry: entry[:3])
        step = Step(
            id=self._step_id,
            rows=tuple(entry[3] for entry in rows),
            removes=removes,
            installs=installs,
            copies=tuple(self._copies),
        )
        return Flight(step=step, owners=tuple(entry[4] for entry in rows), load=self._load())

    def _load(self) -> StepLoad:
        ranks = sum(self._ranks.values())
        return StepLoad(num_tokens=self._num_tokens, sum_rank=ranks, num_positions=self._num_positions)

    def _append(self, tracked: Tracked, row: Row, num_tokens: int) -> None:
        self._rows.append((row.slot, tracked.seq, row.branch, row, tracked))
        self._num_tokens += num_tokens
        self._num_positions += row.start + len(row.tokens)
        tracked.last_step = self._step_id


def _slot_of(tracked: Tracked) -> int:
    assert tracked.lease is not None, f"request {tracked.id} is in a step without a lease"
    return tracked.lease.slot


def _reading(request: Request, *, is_first: bool, is_last: bool) -> Reading | None:
    """What this part of the prompt is read for: readings of one position want the part that holds it."""
    if request.reading is Reading.FIRST:
        return request.reading if is_first else None
    if request.reading in (Reading.SEQUENCE, Reading.LAST):
        return request.reading if is_last else None
    return request.reading


def _has_draw(tracked: Tracked) -> bool:
    """Whether a token is chosen behind the request's known ones. A search that was begun goes on behind its beams."""
    request = tracked.request
    is_silent = bool(request.choices) or request.reading is not None or request.sampling.max_new_tokens == 0
    return not is_silent and not tracked.beams


def _wanted(tracked: Tracked, start: int, end: int) -> tuple[tuple[int, ...], ...]:
    """What follows each of these tokens of the prompt in the prompt, if somebody wants to know how likely it is."""
    if not tracked.wants_prompt:
        return ()
    following = tracked.tokens[start + 1 : min(end + 1, tracked.num_prompt)]
    return (*((token,) for token in following), *((),) * (end - start - len(following)))


def _draw(tracked: Tracked) -> Draw:
    """How the token behind the request's known ones is chosen."""
    return _draw_behind(tracked, tracked.tokens[tracked.num_prompt :])


def _draw_behind(tracked: Tracked, output: Sequence[int]) -> Draw:
    """How the token behind this much of the answer is chosen."""
    request, params = tracked.request, tracked.request.sampling
    index = len(output)
    holds_back_eos = index < params.min_new_tokens and not params.ignore_eos
    num_prompt = tracked.num_prompt
    eos_ids = frozenset[int]() if params.ignore_eos else request.eos_ids
    return Draw(
        params=params,
        seed=params.seed or 0,
        index=index,
        prompt_history=tuple(tracked.tokens[:num_prompt]) if params.needs_history else (),
        output_history=tuple(output) if params.needs_history else (),
        suppress=tuple(sorted(request.eos_ids)) if holds_back_eos and not tracked.is_complete else (),
        forced=_forced(request, index),
        allowed=tracked.allowed,
        num_candidates=num_candidates(params.num_beams, eos_ids) if tracked.is_searching else 0,
    )


def _forced(request: Request, index: int) -> int | None:
    """The id the base insists on at this place of the answer; a last one that ends it yields to `ignore_eos`."""
    if index == 0 and request.forced_first is not None:
        return request.forced_first
    is_last = index == request.sampling.max_new_tokens - 1
    return request.forced_last if is_last and not request.sampling.ignore_eos else None
