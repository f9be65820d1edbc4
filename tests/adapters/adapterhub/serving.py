"""Generation through the real scheduler and the real runner, without threads: chunks, preemption, one mixed batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from peft_serve.adapters.primitives import Adapter
from peft_serve.core import AdapterId, FinishEvent, Request, RequestId, SamplingParams, ScoresEvent, TokenEvent
from peft_serve.model.base import ResidentBase
from peft_serve.model.runner import StepRunner
from peft_serve.scheduling.blocks import BlockLedger
from peft_serve.scheduling.limits import Limits
from peft_serve.scheduling.scheduler import Scheduler
from peft_serve.scheduling.slots import SlotLedger

BLOCK_SIZE: Final = 4


class Served:
    """A base with adapters; `num_blocks` small enough makes requests wait for each other and be preempted."""

    def __init__(
        self,
        base: ResidentBase,
        adapters: Mapping[AdapterId, Adapter],
        *,
        num_blocks: int = 300,
        max_step_tokens: int = 64,
    ) -> None:
        self._base = base
        self._adapters = adapters
        has_source = base.shape.is_encoder_decoder
        self.scheduler = Scheduler(
            Limits(
                max_rows=32,
                max_step_tokens=max_step_tokens,
                max_step_adapters=32,
                max_step_rank=1000,
                max_queue=1000,
                block_size=BLOCK_SIZE,
                max_context=base.shape.max_positions,
                is_encoder_decoder=has_source,
            ),
            SlotLedger(num_slots=32, max_bytes=1 << 30),
            BlockLedger(num_blocks=num_blocks, block_size=BLOCK_SIZE),
            BlockLedger(num_blocks=300, block_size=BLOCK_SIZE) if has_source else None,
            lambda: 0.0,
        )
        self._runner = StepRunner(
            base,
            num_blocks=num_blocks,
            num_cross_blocks=300 if has_source else 0,
            block_size=BLOCK_SIZE,
            adapters=adapters.__getitem__,
        )
        self.num_preempted = 0
        self._reached: dict[RequestId, int] = {}

    def generate(self, adapters: Sequence[AdapterId], prompt: tuple[int, ...], num_new: int) -> list[list[int]]:
        """The answer of each adapter to one prompt, all of them at once."""
        params = SamplingParams(max_new_tokens=num_new)
        for number, adapter in enumerate(adapters):
            self.scheduler.submit(self._request(number, adapter, prompt, params))
        tokens: list[list[int]] = [[] for _ in adapters]
        for event in self._events():
            assert not isinstance(event, FinishEvent) or event.error is None, event
            if isinstance(event, TokenEvent):
                tokens[int(event.request)].append(event.token)
        return tokens

    def score(
        self, adapter: AdapterId, prompt: tuple[int, ...], choices: tuple[tuple[int, ...], ...]
    ) -> tuple[float, ...]:
        """The log-probability of each choice behind a prompt."""
        self.scheduler.submit(self._request(0, adapter, prompt, SamplingParams(), choices))
        (scores,) = (event for event in self._events() if isinstance(event, ScoresEvent))
        return scores.logprobs

    def _request(
        self,
        number: int,
        adapter: AdapterId,
        prompt: tuple[int, ...],
        params: SamplingParams,
        choices: tuple[tuple[int, ...], ...] = (),
    ) -> Request:
        start = self._base.decoder_start_ids if self._base.shape.is_encoder_decoder else ()
        return Request(
            id=RequestId(str(number)),
            adapter=adapter,
            prompt=prompt,
            decoder_prompt=start,
            sampling=params,
            choices=choices,
        )

    def _events(self) -> list[object]:
        events: list[object] = []
        shape = self._base.shape
        while self.scheduler.has_work:
            for adapter in self.scheduler.take_loads():
                footprint = self._adapters[adapter].footprint(is_encoder_decoder=shape.is_encoder_decoder)
                self.scheduler.adapter_ready(adapter, footprint)
            step = self.scheduler.plan()
            if step is None:
                events += self.scheduler.take_events()
                continue
            for row in step.rows:
                self.num_preempted += row.start < self._reached.get(row.request, 0)
                self._reached[row.request] = row.start + len(row.tokens) if row.branch == 0 else 0
            events += self.scheduler.commit(self._runner.run(step))
            self._runner.check()
        self.scheduler.check()
        return events
