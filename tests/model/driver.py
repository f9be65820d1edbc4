"""Drives a `StepRunner` by hand: a scheduler of thirty lines that hands out blocks and cuts prompts at random.

It stands in for the real scheduler: rows of all kinds share steps, in any chunks, and nothing is ever padded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from peft_serve.adapters.primitives import Adapter
from peft_serve.core import (
    BASE,
    AdapterId,
    Draw,
    Install,
    RequestId,
    Row,
    RowResult,
    SamplingParams,
    Step,
    StepResult,
)
from peft_serve.model.base import ResidentBase
from peft_serve.model.runner import StepRunner
from peft_serve.model.step_graphs import Capturing
from peft_serve.scheduling.activation import active_from

BLOCK_SIZE = 4


@dataclass
class Job:
    """A request, and how far it has come."""

    prompt: tuple[int, ...]  # the decoder's prompt
    num_new: int
    source: tuple[int, ...] = ()
    adapter: AdapterId = BASE
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    cross_blocks: list[int] = field(default_factory=list)
    num_done: int = 0  # tokens whose keys and values are computed

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.prompt, *self.output)

    @property
    def is_finished(self) -> bool:
        return len(self.output) == self.num_new


@dataclass(frozen=True)
class Resident:
    """An adapter in a slot, with the blocks of its virtual tokens."""

    slot: int
    blocks: tuple[int, ...]
    num_prefix: int
    num_source: int
    start: tuple[int, ...] = ()
    num_unplaced: int = 0


class Driver:
    """Runs jobs to their end on one runner."""

    def __init__(
        self,
        base: ResidentBase,
        adapters: Mapping[AdapterId, Adapter] | None = None,
        *,
        seed: int = 0,
        num_blocks: int = 300,
        capturing: Capturing | None = None,
    ) -> None:
        self.adapters = dict(adapters or {})
        self.base = base
        self.runner = StepRunner(
            base,
            num_blocks=num_blocks,
            num_cross_blocks=num_blocks if base.shape.is_encoder_decoder else 0,
            block_size=BLOCK_SIZE,
            adapters=self.adapters.__getitem__,
            capturing=capturing,
        )
        self._free = list(range(1, num_blocks))
        self._free_cross = list(range(1, num_blocks))
        self._random = random.Random(seed)
        self._random.shuffle(self._free)
        self._random.shuffle(self._free_cross)
        self._resident = {BASE: Resident(0, (), 0, 0)}
        self._num_steps = 0

    def install(self, *ids: AdapterId) -> StepResult:
        """Put adapters into slots, in one step without rows."""
        installs = []
        for slot, adapter in enumerate(ids, start=len(self._resident)):
            footprint = self.adapters[adapter].footprint(is_encoder_decoder=self.base.shape.is_encoder_decoder)
            blocks = self._take(self._free, footprint.num_prefix_tokens)
            self._resident[adapter] = Resident(
                slot,
                blocks,
                footprint.num_prefix_tokens,
                footprint.num_source_tokens + footprint.num_cross_tokens,
                footprint.start,
                footprint.num_unplaced,
            )
            installs.append(Install(slot=slot, adapter=adapter, blocks=blocks))
        return self.run(installs=tuple(installs))

    def exchange(self, slot: int, adapter: AdapterId, *, is_taken: bool = True) -> StepResult:
        """Have an adapter without virtual tokens in this very slot, in place of the one that is there."""
        done = self.run(installs=(Install(slot=slot, adapter=adapter),), removes=(slot,) if is_taken else ())
        self._resident[adapter] = Resident(slot, (), 0, 0)
        return done

    def finish(self, jobs: list[Job], *, max_chunk: int = 7, share: float = 0.8) -> None:
        """Run all jobs to their end, every step with a random part of them, so large a share, and random chunks."""
        while open_jobs := [job for job in jobs if not job.is_finished]:
            some = [job for job in open_jobs if self._random.random() < share] or open_jobs[:1]
            some.sort(key=lambda job: self._resident[job.adapter].slot)
            copies: list[tuple[int, int]] = []
            rows = [self._row(job, self._random.randint(1, max_chunk), copies, str(jobs.index(job))) for job in some]
            result = self.run(rows=tuple(rows), copies=tuple(copies))
            for job, row, got in zip(some, rows, result.rows, strict=True):
                self._commit(job, row, got)

    def read(self, jobs: list[Job], *, chunk: int = 100) -> list[list[tuple[float, ...]]]:
        """Log-probabilities of all ids behind each token of each job's prompt, all jobs side by side."""
        jobs = sorted(jobs, key=lambda job: self._resident[job.adapter].slot)
        everything = tuple(range(self.base.shape.vocab_size))
        given: list[list[tuple[float, ...]]] = [[] for _ in jobs]
        while open_jobs := [job for job in jobs if job.num_done < len(job.prompt)]:
            copies: list[tuple[int, int]] = []
            rows = [self._row(job, chunk, copies, str(jobs.index(job))) for job in open_jobs]
            wanting = tuple(replace(row, draw=None, wanted=(everything,) * len(row.tokens)) for row in rows)
            result = self.run(rows=wanting, copies=tuple(copies))
            for job, row, got in zip(open_jobs, rows, result.rows, strict=True):
                given[jobs.index(job)] += got.scores
                job.num_done += len(row.tokens)
        return given

    def run(
        self,
        *,
        rows: tuple[Row, ...] = (),
        installs: tuple[Install, ...] = (),
        removes: tuple[int, ...] = (),
        copies: tuple[tuple[int, int], ...] = (),
    ) -> StepResult:
        self._num_steps += 1
        result = self.runner.run(Step(id=self._num_steps, rows=rows, installs=installs, removes=removes, copies=copies))
        self.runner.check()
        assert result.step_id == self._num_steps
        return result

    def give_back(self, jobs: Iterable[Job]) -> None:
        """Free the blocks of jobs, newest first, so that the next jobs get used ones."""
        for job in jobs:
            own = job.blocks[self._resident[job.adapter].num_prefix // BLOCK_SIZE :]
            self._free[:0] = own
            self._free_cross[:0] = job.cross_blocks

    def _row(self, job: Job, chunk: int, copies: list[tuple[int, int]], name: str) -> Row:
        home = self._resident[job.adapter]
        is_first = job.num_done == 0
        if is_first:
            num_whole = home.num_prefix // BLOCK_SIZE
            job.blocks = list(home.blocks[:num_whole])
            if home.num_prefix % BLOCK_SIZE:  # the block the first tokens go into is the request's own
                own = self._take(self._free, 1)
                copies.append((home.blocks[num_whole], own[0]))
                job.blocks.extend(own)
            if job.source:
                job.cross_blocks = list(self._take(self._free_cross, home.num_source + len(job.source)))
        tokens = job.tokens[job.num_done : job.num_done + chunk]
        start = home.num_prefix + job.num_done
        missing = start + len(tokens) - len(job.blocks) * BLOCK_SIZE
        job.blocks.extend(self._take(self._free, max(0, missing)))
        is_last = job.num_done + len(tokens) == len(job.tokens)
        draw = Draw(params=SamplingParams(logprobs=True), seed=0, index=len(job.output)) if is_last else None
        return Row(
            request=RequestId(name),
            slot=home.slot,
            tokens=tokens,
            start=start,
            blocks=tuple(job.blocks),
            draw=draw,
            source=job.source if is_first else (),
            cross_blocks=tuple(job.cross_blocks),
            num_source=home.num_source + len(job.source) if job.source else 0,
            num_unplaced=home.num_unplaced,
            active_from=active_from(job.prompt, home.start, prefix=home.num_prefix),
            prompt=(home.num_prefix, home.num_prefix + len(job.prompt)),
        )

    def _commit(self, job: Job, row: Row, got: RowResult) -> None:
        assert got.request == row.request
        job.num_done += len(row.tokens)
        if row.draw is None:
            assert got.token is None
            return
        assert got.token is not None
        assert got.logprob is not None
        job.output.append(got.token)
        job.logprobs.append(got.logprob)

    def _take(self, free: list[int], num_positions: int) -> tuple[int, ...]:
        count = -(-num_positions // BLOCK_SIZE)
        taken = tuple(free[:count])
        assert len(taken) == count, "the driver has no block left"
        del free[:count]
        return taken


def random_jobs(
    make: random.Random,
    *,
    count: int,
    vocab: int,
    start: tuple[int, ...] = (),
    has_source: bool = False,
    adapter: Callable[[int], AdapterId] = lambda _: BASE,
) -> list[Job]:
    """Jobs of random prompts and lengths; the decoder of an encoder-decoder begins with `start`."""

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(make.randrange(5, vocab) for _ in range(make.randint(low, high)))

    return [
        Job(
            prompt=(*start, *ids(0, 6)) if has_source else ids(1, 22),
            source=ids(1, 25) if has_source else (),
            num_new=make.randint(4, 9),
            adapter=adapter(i),
        )
        for i in range(count)
    ]
