"""The planner: who runs in the next step.

Order of service: requests that decode, one token each or one for each beam; requests in the middle of their prompt
(each leaves room for the next one) or of scoring their choices, oldest first; then the queue in its `Order`. A waiting
request that cannot start yet is overtaken only by requests whose adapter the step carries anyway, and only while it is
younger than `affinity_age_s`. A request whose adapter is still on its way is overtaken by everyone.

When KV blocks run out, the youngest running request goes back to the queue; where shares are kept, one of whoever holds
more rows than its own. Knows no tokens' meaning and no
results: that is `Outcome`.
"""

from __future__ import annotations

from collections.abc import Callable

from peft_serve.core import BASE, AdapterId, FinishEvent, FinishReason, RequestState
from peft_serve.errors import ServeError
from peft_serve.scheduling.draft import Flight, StepDraft
from peft_serve.scheduling.limits import Limits
from peft_serve.scheduling.memory import Memory
from peft_serve.scheduling.order import Order
from peft_serve.scheduling.residency import Residency
from peft_serve.scheduling.roster import Roster
from peft_serve.scheduling.step_time import StepTimeModel
from peft_serve.scheduling.tracked import Tracked


class Planner:
    """Plans one step at a time over the roster."""

    def __init__(
        self,
        limits: Limits,
        roster: Roster,
        memory: Memory,
        residency: Residency,
        order: Order,
        steps: StepTimeModel,
        clock: Callable[[], float],
    ) -> None:
        self._steps = steps
        self._limits = limits
        self._roster = roster
        self._memory = memory
        self._residency = residency
        self._order = order
        self._clock = clock
        self._num_steps = 0

    def plan(self, failures: list[FinishEvent]) -> Flight | None:
        """The next step, None when nobody can run. Requests that can never run end up in `failures`."""
        now_s = self._clock()
        failures += self._roster.end_late(now_s)
        may_admit = self._secure_running()
        if may_admit and self._order.is_by_arrival:
            self._start_overdue(now_s, failures)
        elif may_admit:
            self._give_way()
        draft = StepDraft(self._limits, self._num_steps, self._steps)
        self._serve_running(draft)
        if may_admit:
            self._admit(draft, now_s, failures)
        if draft.num_rows == 0:
            assert not self._roster.running, "requests run, and none of them has a row"
            return None
        self._num_steps += 1
        removes, installs = self._residency.hand_over()
        flight = draft.seal(removes, installs)
        for tracked in flight.owners:
            if tracked.first_step_s is None:
                tracked.first_step_s = now_s
        return flight

    # -- those who run

    def _secure_running(self) -> bool:
        """Give every running request the blocks of its next row, oldest first.

        False when some had to be preempted for it: then nobody is admitted in this step.
        """
        running = self._roster.by_arrival
        num_running = len(running)
        for tracked in running:
            while tracked.id in self._roster.running and not self._memory.secure(tracked):
                self._roster.preempt(self._youngest())
        return len(self._roster.running) == num_running or not self._roster.running

    def _youngest(self) -> Tracked:
        return max(self._roster.running.values(), key=lambda tracked: tracked.seq)

    def _serve_running(self, draft: StepDraft) -> None:
        """Rows for the running requests of the adapters that this step has room for."""
        self._choose_adapters(draft)
        running = [t for t in self._roster.by_arrival if draft.carries(t.adapter)]
        for tracked in running:
            if draft.is_full:
                return
            if tracked.is_decoding:
                draft.add_row(tracked)
            elif tracked.beams and tracked.is_read:
                self._serve_beams(draft, tracked)
        reading = [t for t in running if not t.is_decoding and not t.is_read]
        followers = iter((*reading[1:], self._next_in_line() if reading else None))
        for tracked in running:
            if draft.is_full:
                return
            if tracked.is_read:
                self._serve_choices(draft, tracked)
            elif not tracked.is_decoding:
                self._serve_prompt(draft, tracked, next(followers))

    def _serve_prompt(self, draft: StepDraft, tracked: Tracked, following: Tracked | None) -> None:
        """A part of a prompt. It leaves room for the next one, the last running for the first that waits: so a short
        prompt is read beside a long one, and not behind it."""
        if draft.has_tokens_for(tracked):
            left = 0 if following is None else len(following.tokens) - following.num_computed
            draft.add_row(tracked, leaves=draft.room_for(left))

    def _next_in_line(self) -> Tracked | None:
        """Who would be started next, if there is room."""
        if len(self._roster.running) >= self._limits.max_rows:
            return None
        line = self._order.line(self._roster.queue)
        return next((tracked for tracked in line if self._may_start(tracked)), None)

    def _may_start(self, tracked: Tracked) -> bool:
        return self._residency.footprint(tracked.adapter) is not None and self._roster.has_rows_for(tracked)

    def _choose_adapters(self, draft: StepDraft) -> None:
        """Spend the step's budget of adapters on those that were served longest ago."""
        last_steps: dict[AdapterId, int] = {}
        ranks: dict[AdapterId, int] = {}
        for tracked in self._roster.running.values():
            adapter = tracked.adapter
            if adapter == BASE:
                continue
            ranks[adapter] = tracked.rank
            last_steps[adapter] = max(tracked.last_step, last_steps.get(adapter, -1))
        for adapter in sorted(ranks, key=last_steps.__getitem__):
            if draft.allows(adapter, ranks[adapter]):
                draft.join(adapter, ranks[adapter])

    def _serve_choices(self, draft: StepDraft, tracked: Tracked) -> None:
        """Rows for the choices of a request whose prompt is computed: open ones first, then new ones."""
        for index in tuple(tracked.branches):
            if draft.is_full:
                return
            draft.add_branch_row(tracked, index)
        while not draft.is_full and tracked.open_choices:
            if not self._memory.open_branch(tracked):
                return
            draft.add_branch_row(tracked, next(reversed(tracked.branches)))

    def _serve_beams(self, draft: StepDraft, tracked: Tracked) -> None:
        """Rows for the beams that the search has no word on yet."""
        for index, beam in enumerate(tracked.beams):
            if draft.is_full:
                return
            if beam.given is None:
                draft.add_beam_row(tracked, index)

    # -- those who wait

    def _start_overdue(self, now_s: float, failures: list[FinishEvent]) -> None:
        """Start the oldest usable request before adapters are chosen, if it has waited beyond the bound.

        So that its adapter is the one served longest ago, whatever the running ones would have filled.
        """
        for tracked in self._roster.queue:
            if self._residency.footprint(tracked.adapter) is not None:
                if self._is_overdue(tracked, now_s) and self._roster.has_rows_for(tracked):
                    self._start(tracked, failures)
                return

    def _give_way(self) -> None:
        """Send one request back to the queue if it runs beyond the share of its kind, and the first in line below.

        What it has computed is found again where prefixes are cached, and computed again elsewhere.
        """
        queue, running = self._roster.queue, self._roster.running
        if queue.head is None or self._roster.has_rows_for(queue.head):
            return
        line = self._order.line(queue)
        first = next((t for t in line if self._residency.footprint(t.adapter) is not None), None)
        if first is None or first.num_rows > 1:  # a search waits until as many rows are free
            return
        footprint = self._residency.footprint(first.adapter)
        assert footprint is not None, "`first` has one"
        if self._memory.has_room(first, footprint):
            sent_back = self._order.gives_way(first, queue, running.values(), self._limits.max_rows)
            if sent_back is not None:
                self._roster.preempt(sent_back)

    def _admit(self, draft: StepDraft, now_s: float, failures: list[FinishEvent]) -> None:
        """Start waiting requests while the step has room, each with its first row."""
        is_held = False
        for tracked in self._order.line(self._roster.queue):
            if draft.is_full or len(self._roster.running) >= self._limits.max_rows:
                return
            footprint = self._residency.footprint(tracked.adapter)
            if footprint is None:
                continue
            if is_held and not draft.carries(tracked.adapter):
                if self._is_overdue(tracked, now_s):  # where age is not the order, it may be older than who is held
                    return
                continue
            fits = draft.has_tokens_for(tracked) and draft.allows(tracked.adapter, footprint.max_rank)
            fits = fits and self._roster.has_rows_for(tracked)
            if fits and self._start(tracked, failures):
                draft.join(tracked.adapter, footprint.max_rank)
                draft.add_row(tracked, leaves=draft.room_for(self._roster.queue.num_tokens))
            elif tracked.state is RequestState.FINISHED:
                continue
            elif self._is_overdue(tracked, now_s):
                return
            else:
                is_held = True

    def _start(self, tracked: Tracked, failures: list[FinishEvent]) -> bool:
        """Seat the request's adapter and open its memory; False when it has to wait or has failed."""
        footprint = self._residency.footprint(tracked.adapter)
        assert footprint is not None, f"adapter {tracked.adapter} is neither ready nor seated"
        try:
            self._memory.require_possible(tracked, footprint)
            if not self._memory.has_room(tracked, footprint) or not self._residency.seat(tracked.adapter):
                return False
        except ServeError as error:
            failures.append(self._roster.finish(tracked, FinishReason.FAILED, error))
            return False
        self._roster.start(tracked, footprint)
        return True

    def _is_overdue(self, tracked: Tracked, now_s: float) -> bool:
        return now_s - tracked.request.arrival_s > self._limits.affinity_age_s
