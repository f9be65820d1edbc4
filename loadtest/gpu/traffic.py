"""Traffic in this process: the real scheduler and the real runner, without threads and without HTTP.

Closed: so many requests are always on their way; when one ends, the next comes. Open: requests come when they come.
Adapters are in the host's memory already, as in a server whose host cache holds all of them, and are copied to the
device when a request asks for one that is not there. Decode steps are replayed where a server would.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Final

import numpy as np

from loadtest.gpu.ground import Ground
from loadtest.gpu.rows import BLOCK_SIZE
from loadtest.gpu.serving import Serving, serving
from peft_serve.adapters.primitives import Adapter
from peft_serve.core import (
    BASE,
    AdapterId,
    FinishEvent,
    FinishReason,
    Footprint,
    Request,
    RequestId,
    SamplingParams,
    Step,
    TokenEvent,
)
from peft_serve.model.base import ResidentBase
from peft_serve.scheduling.blocks import BlockLedger
from peft_serve.scheduling.limits import Limits
from peft_serve.scheduling.scheduler import Scheduler
from peft_serve.scheduling.slots import SlotLedger

_MAX_STEP_TOKENS: Final = 2048
_MOST_WAITING: Final = 1 << 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Of every request: tokens in and tokens out."""

    prompt: int
    answer: int

    @property
    def num_blocks(self) -> int:
        """KV blocks of one request."""
        return -(-(self.prompt + self.answer) // BLOCK_SIZE) + 1

    def blocks_of(self, num_rows: int) -> int:
        """KV blocks of a loop of so many rows, with the padding block."""
        return 1 + (num_rows + 1) * self.num_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a stretch of the loop came to."""

    num_tokens: int
    seconds: float
    num_steps: int
    num_installs: int
    num_replayed: int  # steps

    @property
    def replayed(self) -> float:
        """The share of steps that were replayed from a CUDA graph."""
        return self.num_replayed / max(1, self.num_steps)

    @property
    def tokens_per_s(self) -> float:
        """Answer tokens a second."""
        return self.num_tokens / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Waited:
    """What an open loop came to; seconds to each first token, of the requests that had one before the end."""

    served: Served
    first_s: tuple[float, ...]
    num_asked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """One step: whose tokens came, how many requests ended, and how many adapters were copied."""

    tokens: tuple[RequestId, ...]
    num_ended: int
    num_installs: int


def serving_for(
    ground: Ground,
    base: ResidentBase,
    adapters: Callable[[AdapterId], Adapter],
    *,
    num_rows: int,
    lengths: Lengths,
) -> Serving:
    """A runner for loops of up to so many rows."""
    return serving(ground, base, adapters, num_rows=num_rows, num_blocks=lengths.blocks_of(num_rows))


class Loop:
    """Scheduler and runner over one base. One loop at a time on a runner; its graphs stay for the next one."""

    def __init__(self, ground: Ground, served: Serving, *, num_rows: int, num_slots: int, lengths: Lengths) -> None:
        self.ground = ground
        self.lengths = lengths
        self.num_rows = num_rows
        self._serving = served
        self._num_slots = num_slots
        self._ids = count()
        self._footprints: dict[AdapterId, Footprint] = {}
        num_blocks = lengths.blocks_of(num_rows)
        limits = Limits(
            max_rows=num_rows,
            max_step_tokens=_MAX_STEP_TOKENS,
            max_step_adapters=num_rows,
            max_step_rank=1 << 20,
            max_queue=_MOST_WAITING,
            block_size=BLOCK_SIZE,
            max_context=lengths.prompt + lengths.answer,
            prefix_caching=False,  # every prompt is the same one
            max_loads=num_rows,
        )
        self._scheduler = Scheduler(
            limits,
            SlotLedger(num_slots=num_slots, max_bytes=1 << 40),
            BlockLedger(num_blocks=num_blocks, block_size=BLOCK_SIZE),
            None,
            ground.clock,
        )

    @property
    def num_replayed(self) -> int:
        """Steps of the runner so far that were replayed."""
        return self._serving.outcomes.num_replayed

    def submit(self, adapter: AdapterId, *, answer: int) -> RequestId:
        """A request that comes now, for so many tokens."""
        number = next(self._ids)
        id_ = RequestId(str(number))
        self._scheduler.submit(
            Request(
                id=id_,
                adapter=adapter,
                prompt=tuple(5 + (number + i) % 50 for i in range(self.lengths.prompt)),
                sampling=SamplingParams(max_new_tokens=answer, ignore_eos=True),
                arrival_s=self.ground.clock(),
            )
        )
        return id_

    def step(self) -> Stepped:
        """The next step. RuntimeError where there is none, or a request fails."""
        for adapter in self._scheduler.take_loads():
            self._scheduler.adapter_ready(adapter, self._footprint(adapter))
        step = self._scheduler.plan()
        if step is None:
            raise RuntimeError("no request can run: the loop's own sizes do not fit together")
        events = self._scheduler.commit(self._serving.runner.run(step))
        ends = [event for event in events if isinstance(event, FinishEvent)]
        failed = next((event for event in ends if event.reason is FinishReason.FAILED), None)
        if failed is not None:
            raise RuntimeError(f"a request failed: {failed.error}")
        tokens = tuple(event.request for event in events if isinstance(event, TokenEvent))
        return Stepped(tokens=tokens, num_ended=len(ends), num_installs=len(step.installs))

    @property
    def is_idle(self) -> bool:
        """Whether nobody asks for anything."""
        return not self._scheduler.open_requests()

    def end_all(self) -> None:
        """Whoever is on the way asks for nothing any more."""
        for request in self._scheduler.open_requests():
            self._scheduler.cancel(request)

    def close(self) -> None:
        """Empty the slots, for the next loop on this base."""
        self._serving.runner.run(Step(id=0, rows=(), removes=tuple(range(1, self._num_slots + 1))))

    def _footprint(self, adapter: AdapterId) -> Footprint:
        if adapter not in self._footprints:
            self._footprints[adapter] = self._serving.adapters(adapter).footprint(is_encoder_decoder=False)
        return self._footprints[adapter]


class ClosedLoop(Loop):
    """So many requests are always on their way."""

    def run(self, asked: Iterator[AdapterId], *, most_s: float, fewest_steps: int = 4) -> Served:
        """Serve requests for these adapters for so long, and tell what came after the first answers had ended, so that
        requests of all ages share the steps. RuntimeError where a request fails. All are ended behind it."""
        for number in range(self.num_rows):
            # Ages are spread from the start, or all rows would end in the same step for ever.
            self.submit(next(asked), answer=1 + number % self.lengths.answer)
        num_ended = num_tokens = num_steps = num_installs = before = 0
        began_s, until_s = self.ground.clock(), float("inf")
        while num_steps < fewest_steps or self.ground.clock() < until_s:
            done = self.step()
            if until_s == float("inf"):
                num_ended += done.num_ended
                if num_ended >= self.num_rows:
                    self.ground.settle()
                    began_s = self.ground.clock()
                    until_s = began_s + most_s
                    before = self.num_replayed
            else:
                num_tokens, num_steps = num_tokens + len(done.tokens), num_steps + 1
                num_installs += done.num_installs
            for _ in range(done.num_ended):
                self.submit(next(asked), answer=self.lengths.answer)
        self.ground.settle()
        seconds = self.ground.clock() - began_s
        self.end_all()
        return Served(
            num_tokens=num_tokens,
            seconds=seconds,
            num_steps=num_steps,
            num_installs=num_installs,
            num_replayed=self.num_replayed - before,
        )


class OpenLoop(Loop):
    """Requests come when they come, as a Poisson process."""

    def run(self, asked: Iterator[AdapterId], *, per_s: float, most_s: float, most_requests: int = 4096) -> Waited:
        """Serve requests for these adapters that come at this rate, for so long; what is on its way then is ended.
        RuntimeError where a request fails."""
        gaps = np.random.default_rng(0).exponential(1.0 / per_s, size=most_requests)
        began_s = self.ground.clock()
        comes_s = [began_s + float(at) for at in np.cumsum(gaps)]
        came_s: dict[RequestId, float] = {}
        first_s: list[float] = []
        num_asked = num_tokens = num_steps = num_installs = 0
        before = self.num_replayed
        while self.ground.clock() < began_s + most_s and (num_asked < len(comes_s) or not self.is_idle):
            while num_asked < len(comes_s) and comes_s[num_asked] <= self.ground.clock():
                came_s[self.submit(next(asked), answer=self.lengths.answer)] = comes_s[num_asked]
                num_asked += 1
            if self.is_idle:
                continue  # the next one is on its way: a GPU's steps leave no time to sleep
            done = self.step()
            now_s = self.ground.clock()
            first_s += [now_s - came_s.pop(id_) for id_ in done.tokens if id_ in came_s]
            num_tokens, num_steps = num_tokens + len(done.tokens), num_steps + 1
            num_installs += done.num_installs
        seconds = self.ground.clock() - began_s
        self.end_all()
        served = Served(
            num_tokens=num_tokens,
            seconds=seconds,
            num_steps=num_steps,
            num_installs=num_installs,
            num_replayed=self.num_replayed - before,
        )
        return Waited(served=served, first_s=tuple(first_s), num_asked=num_asked)


def forever(adapters: list[AdapterId], order: list[int]) -> Iterator[AdapterId]:
    """The adapters in this order again and again; the base's, where there is none."""
    while True:
        for number in order or [0]:
            yield adapters[number] if adapters else BASE
