"""Steps in this process, without HTTP: the resident base, a `StepRunner` and rows of any length. What is timed is
the executor alone."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from transformers import AutoModelForCausalLM

from loadtest.installing import holding
from loadtest.work import Load, num_virtual
from peft_serve.adapters.primitives import Adapter
from peft_serve.config import Settings
from peft_serve.core import BASE_SLOT, AdapterId, Draw, RequestId, Row, SamplingParams, Step
from peft_serve.engine.cpu_kernels import speed_up
from peft_serve.engine.gpu_kernels import speed_up as speed_up_on_gpu
from peft_serve.model.base import ResidentBase
from peft_serve.model.runner import StepRunner

T = TypeVar("T")

_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Front:
    """The virtual tokens of an adapter, and the blocks that their keys and values are in."""

    num_tokens: int
    blocks: tuple[int, ...]


_NO_FRONT = Front(0, ())
_MOST_SLOTS = 16  # that have virtual tokens at once
_MOST_FRONT_BLOCKS = 4  # of one adapter


class StepBench:
    """A base, and room for `num_positions` of context, rounded up to blocks for each row."""

    def __init__(
        self,
        base: ResidentBase,
        *,
        num_positions: int,
        max_rows: int = 64,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.base = base
        self._clock = clock
        self._adapters: dict[AdapterId, Adapter] = {}
        self._fronts: dict[int, Front] = {}
        self._num_blocks = num_positions // _BLOCK_SIZE + 2 * max_rows
        self._runner = StepRunner(
            base,
            num_blocks=self._num_blocks + 1 + _MOST_SLOTS * _MOST_FRONT_BLOCKS,
            num_cross_blocks=0,
            block_size=_BLOCK_SIZE,
            adapters=self._adapters.__getitem__,
        )

    @contextmanager
    def holding(self, adapters: Mapping[int, Adapter]) -> Iterator[None]:
        """Adapters by slot, installed inside the block; their virtual tokens stand in front of their rows."""
        self._fronts = dict(self._placed(adapters))
        try:
            with holding(self._runner, self._adapters, adapters, {s: f.blocks for s, f in self._fronts.items()}):
                yield
        finally:
            self._fronts = {}

    def step_s(self, load: Load, *, repeats: int) -> float:
        """Seconds of a step of the base alone: the median of so many."""
        slots = [BASE_SLOT] * load.num_rows
        self._fill(load, slots)
        rows = self._rows(load, slots)
        skipped = _warm_ups(repeats)
        return median([self._once_s(rows) for _ in range(repeats + skipped)][skipped:])

    def between(self, load: Load, beside: Callable[[], T], *, repeats: int) -> tuple[float, list[T]]:
        """Seconds of a step of the base alone, and what `beside` gave: each twice in every round, in the order beside,
        step, step, beside, so that a machine whose rates change changes them for both."""
        slots = [BASE_SLOT] * load.num_rows
        self._fill(load, slots)
        rows = self._rows(load, slots)
        for _ in range(_warm_ups(repeats)):
            self._once_s(rows)
        times, given = list[float](), list[T]()
        for _ in range(repeats):
            given.append(beside())
            times += [self._once_s(rows) for _ in range(2)]
            given.append(beside())
        return median(times), given

    def beside_base_s(self, load: Load, slots: list[int], *, repeats: int) -> tuple[float, float]:
        """Seconds of a step whose rows use these slots, and of one without adapters: medians of so many, taken in
        turns, so that a machine that slows down slows both."""
        slots, none = sorted(slots), [BASE_SLOT] * load.num_rows
        self._fill(load, none)
        self._fill(load, slots)
        own, base = (self._rows(load, each) for each in (slots, none))
        skipped = _warm_ups(repeats)
        times = [(self._once_s(own), self._once_s(base)) for _ in range(repeats + skipped)][skipped:]
        return median(pair[0] for pair in times), median(pair[1] for pair in times)

    def _placed(self, adapters: Mapping[int, Adapter]) -> Iterator[tuple[int, Front]]:
        """Blocks behind those of the rows, for as many virtual tokens as each adapter has."""
        free = self._num_blocks + 1
        for slot, adapter in adapters.items():
            num_tokens = num_virtual(adapter)
            if num_tokens:
                count = -(-num_tokens // _BLOCK_SIZE)
                yield slot, Front(num_tokens, tuple(range(free, free + count)))
                free += count
        assert free <= self._num_blocks + 1 + _MOST_SLOTS * _MOST_FRONT_BLOCKS, "more virtual tokens than there is room"

    def _fill(self, load: Load, slots: list[int]) -> None:
        """Compute the context of every row, behind a copy of the last block of what stands in front, if it is not
        full."""
        copies = tuple(self._copies(self._rows(load, slots)))
        if copies:
            self._runner.run(Step(id=0, rows=(), copies=copies))
        if load.context:
            before = Load(num_rows=load.num_rows, num_tokens=load.context)
            self._runner.run(Step(id=0, rows=self._rows(before, slots, behind=load.num_tokens)))

    def _copies(self, rows: tuple[Row, ...]) -> Iterator[tuple[int, int]]:
        for row in rows:
            front = self._fronts.get(row.slot, _NO_FRONT)
            if front.num_tokens % _BLOCK_SIZE:
                yield front.blocks[-1], row.blocks[front.num_tokens // _BLOCK_SIZE]

    def _once_s(self, rows: tuple[Row, ...]) -> float:
        began_s = self._clock()
        self._runner.run(Step(id=3, rows=rows))  # what is drawn is read back: the device is done
        return self._clock() - began_s

    def _rows(self, load: Load, slots: list[int], *, behind: int = 0) -> tuple[Row, ...]:
        """`behind` positions are kept free after each row's tokens."""
        each = 1 + -(-(load.context + load.num_tokens + behind) // _BLOCK_SIZE)  # one is for the copy
        assert each * load.num_rows <= self._num_blocks, f"{load} needs more positions than the bench has"
        return tuple(
            self._row(number, slot, load, tuple(range(1 + number * each, 1 + (number + 1) * each)))
            for number, slot in enumerate(slots)
        )

    def _row(self, number: int, slot: int, load: Load, blocks: tuple[int, ...]) -> Row:
        front = self._fronts.get(slot, _NO_FRONT)
        places = range(load.context, load.context + load.num_tokens)
        return Row(
            request=RequestId(str(number)),
            slot=slot,
            tokens=tuple(5 + (7 * number + place) % 50 for place in places),
            start=front.num_tokens + load.context,
            blocks=front.blocks[: front.num_tokens // _BLOCK_SIZE] + blocks,
            draw=Draw(params=SamplingParams(), seed=0, index=0),
        )


def _warm_ups(repeats: int) -> int:
    """Runs that gather ops and fill caches, and are not counted."""
    return 2 if repeats > 2 else 1


def load_base(folder: Path, *, dtype: torch.dtype, device: str, num_threads: int) -> ResidentBase:
    """The base of a folder, packed as the server would have it."""
    torch.set_num_threads(num_threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    base = ResidentBase(model, name=folder.name)
    speed_up(Settings(prepack="on"), base, os.environ, print)
    speed_up_on_gpu("auto", base, print)
    return base
