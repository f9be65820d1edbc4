"""A small world around a scheduler: a virtual clock, adapters that load when told to, and a fake model.

It checks every step against the limits, all books after every act, and every answer against `alone`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import pytest

from peft_serve.core import (
    BASE,
    BASE_SLOT,
    AdapterId,
    BeamsEvent,
    Constraint,
    Event,
    FinishEvent,
    FinishReason,
    Footprint,
    PromptEvent,
    Reading,
    ReadingEvent,
    Request,
    RequestId,
    SamplingParams,
    ScoresEvent,
    Step,
    TokenEvent,
)
from peft_serve.errors import AdapterUnavailable, DeadlineMissed, InvalidParameter, PromptTooLong, QueueFull
from peft_serve.scheduling.blocks import BlockLedger
from peft_serve.scheduling.limits import Limits
from peft_serve.scheduling.order import Order
from peft_serve.scheduling.scheduler import Scheduler
from peft_serve.scheduling.slots import SlotLedger
from tests.scheduling.fake_model import Answer, FakeModel, alone

EOS = 3


def some_limits(**changes: object) -> Limits:
    """Limits small enough to be felt."""
    defaults: dict[str, object] = {
        "max_rows": 4,
        "max_step_tokens": 8,
        "max_step_adapters": 2,
        "max_step_rank": 24,
        "max_queue": 1000,
        "block_size": 4,
        "max_context": 40,
        "affinity_age_s": 2.0,
        "max_loads": 3,
    }
    return Limits(**(defaults | changes))  # type: ignore[arg-type]


@cache
def adapter_id(index: int) -> AdapterId:
    return AdapterId(f"sha256:{index:064x}")


def some_footprints(
    num_adapters: int, *, is_encoder_decoder: bool = False, is_encoder: bool = False
) -> dict[AdapterId, Footprint]:
    """Adapters of every kind: low-rank only, a whole-block prefix, a ragged prefix, a soft source prompt."""
    has_source = is_encoder_decoder or is_encoder
    footprints = {BASE: Footprint(num_bytes=0)}
    for index in range(num_adapters):
        footprints[adapter_id(index)] = Footprint(
            num_bytes=10 + 5 * (index % 3),
            max_rank=(8, 16, 32, 0)[index % 4],
            num_prefix_tokens=0 if is_encoder else (0, 4, 6, 0, 1)[index % 5],
            num_source_tokens=(0, 3)[index % 2] if has_source else 0,
        )
    return footprints


class World:
    """A scheduler at work, watched."""

    tick_s = 0.1  # from one step to the next

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        footprints: dict[AdapterId, Footprint] | None = None,
        num_slots: int = 3,
        max_bytes: int = 60,
        num_blocks: int = 40,
        num_cross_blocks: int = 12,
        order: Order | None = None,
    ) -> None:
        self.limits = limits or some_limits()
        is_seq2seq = self.limits.is_encoder_decoder
        self.footprints = footprints or some_footprints(
            7, is_encoder_decoder=is_seq2seq, is_encoder=self.limits.is_encoder
        )
        self.now_s = 100.0
        self.slots = SlotLedger(num_slots=num_slots, max_bytes=max_bytes)
        size = self.limits.block_size
        self.blocks = BlockLedger(num_blocks=num_blocks, block_size=size)
        self.cross = BlockLedger(num_blocks=num_cross_blocks, block_size=size) if is_seq2seq else None
        self.scheduler = Scheduler(self.limits, self.slots, self.blocks, self.cross, lambda: self.now_s, order)
        self.model = FakeModel(num_slots=num_slots, block_size=size, footprints=self.footprints)
        self.requests: dict[RequestId, Request] = {}
        self.tokens: dict[RequestId, list[int]] = defaultdict(list)
        self.scores: dict[RequestId, ScoresEvent] = {}
        self.readings: dict[RequestId, ReadingEvent] = {}
        self.finishes: dict[RequestId, FinishEvent] = {}
        self.last_tokens: dict[RequestId, TokenEvent] = {}
        self.beams: dict[RequestId, BeamsEvent] = {}
        self.prompts: dict[RequestId, PromptEvent] = {}
        self.loading: list[AdapterId] = []
        self.steps: list[Step] = []
        self.loads: list[AdapterId] = []

    # -- acts

    def submit(
        self,
        adapter: AdapterId = BASE,
        prompt: Sequence[int] = (1, 2, 5),
        *,
        decoder_prompt: Sequence[int] = (0,),
        choices: Sequence[Sequence[int]] = (),
        sampling: SamplingParams | None = None,
        reading: Reading | None = None,
        segments: Sequence[int] = (),
        max_wait_s: float | None = None,
        max_time_s: float | None = None,
        prompt_logprobs: int | None = None,
        constraint: Constraint | None = None,
        tenant: str = "",
        tenant_weight: float = 1.0,
    ) -> RequestId:
        is_seq2seq = self.limits.is_encoder_decoder
        request = Request(
            id=RequestId(f"r{len(self.requests)}"),
            adapter=adapter,
            prompt=tuple(prompt),
            decoder_prompt=tuple(decoder_prompt) if is_seq2seq else (),
            choices=tuple(tuple(choice) for choice in choices),
            sampling=sampling or SamplingParams(max_new_tokens=5, seed=7, ignore_eos=True),
            eos_ids=frozenset({EOS}),
            reading=reading,
            segments=tuple(segments),
            arrival_s=self.now_s,
            deadline_s=None if max_wait_s is None else self.now_s + max_wait_s,
            max_time_s=max_time_s,
            prompt_logprobs=prompt_logprobs,
            constraint=constraint,
            tenant=tenant,
            tenant_weight=tenant_weight,
        )
        self.requests[request.id] = request
        try:
            self.scheduler.submit(request)
        except (DeadlineMissed, ValueError):
            del self.requests[request.id]
            raise
        self.check_books()
        return request.id

    def cancel(self, request: RequestId) -> None:
        self._note(self.scheduler.cancel(request, FinishReason.CANCELLED))

    def ask(self) -> None:
        loads = self.scheduler.take_loads()
        assert not set(loads) & set(self.loading), "a load is asked for twice"
        assert len(loads) == len(set(loads))
        assert BASE not in loads
        self.loads.extend(loads)
        self.loading.extend(loads)
        self.check_books()

    def finish_load(self, adapter: AdapterId, *, error: Exception | None = None) -> None:
        self.loading.remove(adapter)
        if error is None:
            self.scheduler.adapter_ready(adapter, self.footprints[adapter])
            self.check_books()
        else:
            self._note(self.scheduler.adapter_failed(adapter, error))

    def load_all(self) -> None:
        self.ask()
        for adapter in tuple(self.loading):
            self.finish_load(adapter)

    def step(self, *, broken: AdapterId | None = None, crash: str = "", cancel: RequestId | None = None) -> bool:
        """One step, unless there is none; `cancel` comes while it is under way.

        `crash`: the model raises 'early', before it has done anything, or 'late', after everything.
        """
        self.now_s += self.tick_s
        step = self.scheduler.plan()
        self.check_books()
        self._note(self.scheduler.take_events())
        if step is None:
            return False
        self.steps.append(step)
        self._check_step(step)
        result = None
        if crash != "early":
            result = self.model.run(step, is_broken=lambda adapter: adapter == broken)
        if cancel is not None:
            self.cancel(cancel)
        if crash or result is None:
            self._note(self.scheduler.abandon(step.id, RuntimeError("the device is on fire")))
        else:
            self._note(self.scheduler.commit(result))
        return True

    def drain(self) -> None:
        """Run until nothing is left; then nothing may be held."""
        self.drain_requests()
        self.check_empty()

    def drain_requests(self) -> None:
        """Run until every request has ended."""
        for _ in range(200 + 100 * len(self.requests)):
            self.load_all()
            if not self.step() and not self.scheduler.has_work:
                break
        assert not self.scheduler.has_work, "requests are left over"

    def check_empty(self) -> None:
        self.check_books()
        assert self.slots.num_leases == 0
        for resident in self.slots.resident():
            self.scheduler.unpin(resident.adapter)
            assert self.scheduler.evict(resident.adapter)
        assert self.slots.num_bytes == 0
        assert self.blocks.num_free == self.blocks.capacity
        assert self.cross is None or self.cross.num_free == self.cross.capacity

    def check_books(self) -> None:
        """After every act; who makes many of them may do it less often."""
        self.scheduler.check()

    # -- verdicts

    def expected(self, request: RequestId) -> Answer:
        asked = self.requests[request]
        cross = 0 if self.cross is None else self.cross.capacity
        footprint = self.footprints[asked.adapter]
        prefix = self.limits.blocks_for(footprint.num_prefix_tokens)
        capacity = self.blocks.capacity - max(sum(footprint.runs), self.limits.num_adapter_blocks - prefix)
        return alone(asked, footprint, self.limits, capacity=capacity, cross_capacity=cross)

    def check_answers(self) -> None:
        """Every request got what it gets alone; one that was ended got the beginning of it."""
        for request in self.requests:
            self.check_answer(request)

    def check_answer(self, request: RequestId) -> None:
        expected, finish = self.expected(request), self.finishes[request]
        tokens = tuple(self.tokens[request])
        found = self.beams[request].continuations if request in self.beams else ()
        assert finish.num_output_tokens == len(found[0].tokens if found else tokens)
        if was_ended_from_outside(finish):
            assert tokens == expected.tokens[: len(tokens)]
            return
        assert (tokens, finish.reason) == (expected.tokens, expected.reason)
        assert found == expected.continuations
        if request in self.prompts or expected.prompt_logprobs:
            told = self.prompts[request]
            assert told.logprobs == expected.prompt_logprobs
            assert {len(top) for top in told.tops} <= {self.requests[request].prompt_logprobs}
        is_too_long = expected.reason is FinishReason.FAILED and not expected.is_invalid
        assert isinstance(finish.error, PromptTooLong) == is_too_long
        assert isinstance(finish.error, InvalidParameter) == expected.is_invalid
        self._check_rows(request, expected.rows)
        if expected.logprobs:
            assert self.scores[request].logprobs == expected.logprobs

    def _check_rows(self, request: RequestId, expected: tuple[tuple[float, ...], ...]) -> None:
        assert (request in self.readings) == bool(expected)
        if expected:
            rows = self.readings[request].rows
            assert len(rows) == len(expected)
            for row, own in zip(rows, expected, strict=True):
                assert row == pytest.approx(own)

    # -- watching

    def _note(self, events: list[Event]) -> None:
        for event, following in zip(events, [*events[1:], None], strict=False):
            assert event.request not in self.finishes, "an event after the end"
            match event:
                case TokenEvent():
                    if event.is_last:
                        assert isinstance(following, FinishEvent), "the last token is followed by the end"
                        assert following.request == event.request
                    self.last_tokens[event.request] = event
                    assert event.index == len(self.tokens[event.request])
                    self.tokens[event.request].append(event.token)
                case BeamsEvent():
                    assert event.request not in self.beams, "a search ends twice"
                    self.beams[event.request] = event
                case PromptEvent():
                    assert event.request not in self.prompts, "a prompt is told twice"
                    assert not self.tokens[event.request], "a prompt is told after the first token"
                    self.prompts[event.request] = event
                case ReadingEvent():
                    assert event.request not in self.readings, "a request is read twice"
                    self.readings[event.request] = event
                case ScoresEvent():
                    self.scores[event.request] = event
                case FinishEvent():
                    self.finishes[event.request] = event
        self.check_books()

    def _check_step(self, step: Step) -> None:
        limits = self.limits
        assert 0 < len(step.rows) <= limits.max_rows
        num_tokens = sum(len(row.tokens) for row in step.rows)
        sources = [len(row.source) for row in step.rows if row.source]
        assert num_tokens + sum(sources[1:]) <= limits.max_step_tokens + sum(sources[:1])
        if len(sources) != 1:
            assert step.num_tokens <= limits.max_step_tokens + max(sources, default=0)
        arrivals = {request: i for i, request in enumerate(self.requests)}
        order = [(row.slot, arrivals[row.request], row.branch) for row in step.rows]
        assert order == sorted(set(order))
        slots = {row.slot for row in step.rows} - {BASE_SLOT}
        adapters = [resident.adapter for resident in self.slots.resident() if resident.slot in slots]
        assert len(adapters) == len(slots) <= limits.max_step_adapters
        ranks = [self.footprints[adapter].max_rank for adapter in adapters]
        assert len(ranks) <= 1 or sum(ranks) <= limits.max_step_rank
        for row in step.rows:
            assert bool(row.tokens) != limits.is_encoder
            assert len(row.blocks) * limits.block_size >= row.start + len(row.tokens)
            assert len(row.wanted) <= len(row.tokens)
        assert len({copy[1] for copy in step.copies}) == len(step.copies), "a block is copied to twice"


def was_ended_from_outside(finish: FinishEvent) -> bool:
    """Cancelled, or failed by its adapter or by its step."""
    if finish.reason is FinishReason.CANCELLED:
        return True
    return isinstance(finish.error, (RuntimeError, AdapterUnavailable, QueueFull))
