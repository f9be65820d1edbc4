"""Drives a `StepRunner` over rows that only read: an encoder's whole rows, or a decoder's prompts in chunks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peft_serve.adapters.primitives import Adapter
from peft_serve.core import (
    BASE,
    AdapterId,
    FinishEvent,
    FinishReason,
    Reading,
    ReadingEvent,
    Request,
    RequestId,
)
from peft_serve.model.base import ResidentBase
from peft_serve.model.runner import StepRunner
from peft_serve.scheduling.blocks import BlockLedger
from peft_serve.scheduling.limits import Limits
from peft_serve.scheduling.scheduler import Scheduler
from peft_serve.scheduling.slots import SlotLedger

_BLOCK_SIZE = 4
_NUM_BLOCKS = 200


@dataclass(frozen=True)
class Wish:
    """One request for a reading."""

    reading: Reading
    prompt: tuple[int, ...]
    adapter: AdapterId = BASE
    segments: tuple[int, ...] = ()


Rows = tuple[tuple[float, ...], ...]


class ReadingDriver:
    """The real scheduler and the real runner, without threads."""

    def __init__(
        self,
        base: ResidentBase,
        adapters: Mapping[AdapterId, Adapter] | None = None,
        *,
        max_step_tokens: int = 64,
        max_rows: int = 64,
    ) -> None:
        self._base = base
        self._adapters = dict(adapters or {})
        shape = base.shape
        limits = Limits(
            max_rows=max_rows,
            max_step_tokens=max_step_tokens,
            max_step_adapters=16,
            max_step_rank=1000,
            max_queue=1000,
            block_size=_BLOCK_SIZE,
            max_context=shape.max_positions,
            is_encoder=shape.is_encoder,
            pad_id=base.pad_id,
        )
        num_blocks = 2 if shape.is_encoder else _NUM_BLOCKS
        self.scheduler = Scheduler(
            limits,
            SlotLedger(num_slots=32, max_bytes=1 << 30),
            BlockLedger(num_blocks=num_blocks, block_size=_BLOCK_SIZE),
            None,
            lambda: 0.0,
        )
        self.runner = StepRunner(
            base,
            num_blocks=num_blocks,
            num_cross_blocks=0,
            block_size=_BLOCK_SIZE,
            adapters=self._adapters.__getitem__,
        )
        self.num_rows_by_step: list[int] = []

    def read(self, wishes: Sequence[Wish], *, seed: int = 0) -> list[Rows | Exception]:
        """What each wish gets, all of them submitted at once in a random order: rows, or the error it failed with."""
        order = list(range(len(wishes)))
        random.Random(seed).shuffle(order)
        for i in order:
            self.scheduler.submit(self._request(i, wishes[i]))
        given: dict[int, Rows | Exception] = {}
        for event in self._events():
            if isinstance(event, ReadingEvent):
                given[int(event.request)] = event.rows
            elif isinstance(event, FinishEvent):
                assert (event.reason is FinishReason.READ) == (int(event.request) in given), event
                if event.error is not None:
                    given[int(event.request)] = event.error
        self.scheduler.check()
        return [given[i] for i in range(len(wishes))]

    def _request(self, number: int, wish: Wish) -> Request:
        return Request(
            id=RequestId(str(number)),
            adapter=wish.adapter,
            prompt=wish.prompt,
            reading=wish.reading,
            segments=wish.segments,
        )

    def _events(self) -> list[object]:
        events: list[object] = []
        shape = self._base.shape
        while self.scheduler.has_work:
            for adapter in self.scheduler.take_loads():
                footprint = self._adapters[adapter].footprint(
                    is_encoder_decoder=shape.is_encoder_decoder, is_encoder=shape.is_encoder
                )
                self.scheduler.adapter_ready(adapter, footprint)
            step = self.scheduler.plan()
            if step is None:
                events += self.scheduler.take_events()
                continue
            self.num_rows_by_step.append(len(step.rows))
            events += self.scheduler.commit(self.runner.run(step))
            self.runner.check()
        return events


def random_prompt(make: random.Random, vocab: int, low: int = 1, high: int = 20) -> tuple[int, ...]:
    return tuple(make.randrange(5, vocab) for _ in range(make.randint(low, high)))
