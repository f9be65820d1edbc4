"""A closed loop in this process: the real scheduler and the real runner, without threads and without HTTP.

So many requests are always on their way; when one ends, the next comes. Adapters are in the host's memory already, as
in a server whose host cache holds all of them, and are copied to the device when a request asks for one that is not
there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

from loadtest.gpu.ground import Ground
from loadtest.gpu.rows import BLOCK_SIZE
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
from peft_serve.model.runner import StepRunner
from peft_serve.scheduling.blocks import BlockLedger
from peft_serve.scheduling.limits import Limits
from peft_serve.scheduling.scheduler import Scheduler
from peft_serve.scheduling.slots import SlotLedger

_MAX_STEP_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Of every request: tokens in and tokens out."""

    prompt: int
    answer: int

    @property
    def num_blocks(self) -> int:
        """KV blocks of one request."""
        return -(-(self.prompt + self.answer) // BLOCK_SIZE) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a stretch of the loop came to."""

    num_tokens: int
    seconds: float
    num_steps: int
    num_installs: int

    @property
    def tokens_per_s(self) -> float:
        """Answer tokens a second."""
        return self.num_tokens / self.seconds


class ClosedLoop:
    """See the module. One loop at a time on a base."""

    def __init__(
        self,
        ground: Ground,
        base: ResidentBase,
        adapters: Callable[[AdapterId], Adapter],
        *,
        num_rows: int,
        num_slots: int,
        lengths: Lengths,
    ) -> None:
        self._ground = ground
        self._adapters = adapters
        self._lengths = lengths
        self._num_rows = num_rows
        self._num_slots = num_slots
        self._ids = count()
        self._footprints: dict[AdapterId, Footprint] = {}
        num_blocks = 1 + (num_rows + 1) * lengths.num_blocks
        limits = Limits(
            max_rows=num_rows,
            max_step_tokens=_MAX_STEP_TOKENS,
            max_step_adapters=num_rows,
            max_step_rank=1 << 20,
            max_queue=2 * num_rows,
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
        self._runner = StepRunner(
            base, num_blocks=num_blocks, num_cross_blocks=0, block_size=BLOCK_SIZE, adapters=adapters
        )

    def run(self, asked: Iterator[AdapterId], *, most_s: float, fewest_steps: int = 4) -> Served:
        """Serve requests for these adapters for so long, and tell what came after the first answers had ended, so that
        requests of all ages share the steps. RuntimeError where a request fails. All are ended behind it."""
        for _ in range(self._num_rows):
            self._submit(next(asked))
        num_ended = num_tokens = num_steps = num_installs = 0
        began_s, until_s = self._ground.clock(), float("inf")
        while num_steps < fewest_steps or self._ground.clock() < until_s:
            tokens, ended, installs = self._step()
            if until_s == float("inf"):
                num_ended += ended
                if num_ended >= self._num_rows:
                    self._ground.settle()
                    began_s = self._ground.clock()
                    until_s = began_s + most_s
            else:
                num_tokens, num_steps, num_installs = num_tokens + tokens, num_steps + 1, num_installs + installs
            for _ in range(ended):
                self._submit(next(asked))
        self._ground.settle()
        seconds = self._ground.clock() - began_s
        for request in self._scheduler.open_requests():
            self._scheduler.cancel(request)
        return Served(num_tokens=num_tokens, seconds=seconds, num_steps=num_steps, num_installs=num_installs)

    def close(self) -> None:
        """Empty the slots, for the next loop on this base."""
        self._runner.run(Step(id=0, rows=(), removes=tuple(range(1, self._num_slots + 1))))

    def _submit(self, adapter: AdapterId) -> None:
        number = next(self._ids)
        # Ages are spread from the start, or all rows would end in the same step for ever.
        answer = self._lengths.answer if number >= self._num_rows else 1 + number % self._lengths.answer
        self._scheduler.submit(
            Request(
                id=RequestId(str(number)),
                adapter=adapter,
                prompt=tuple(5 + (number + i) % 50 for i in range(self._lengths.prompt)),
                sampling=SamplingParams(max_new_tokens=answer, ignore_eos=True),
                arrival_s=self._ground.clock(),
            )
        )

    def _step(self) -> tuple[int, int, int]:
        """Tokens, ended requests and installs of the next step."""
        for adapter in self._scheduler.take_loads():
            self._scheduler.adapter_ready(adapter, self._footprint(adapter))
        step = self._scheduler.plan()
        if step is None:
            raise RuntimeError("no request can run: the loop's own sizes do not fit together")
        events = self._scheduler.commit(self._runner.run(step))
        ends = [event for event in events if isinstance(event, FinishEvent)]
        failed = next((event for event in ends if event.reason is FinishReason.FAILED), None)
        if failed is not None:
            raise RuntimeError(f"a request failed: {failed.error}")
        return sum(isinstance(event, TokenEvent) for event in events), len(ends), len(step.installs)

    def _footprint(self, adapter: AdapterId) -> Footprint:
        if adapter not in self._footprints:
            self._footprints[adapter] = self._adapters(adapter).footprint(is_encoder_decoder=False)
        return self._footprints[adapter]


def forever(adapters: list[AdapterId], order: list[int]) -> Iterator[AdapterId]:
    """The adapters in this order again and again; the base's, where there is none."""
    while True:
        for number in order or [0]:
            yield adapters[number] if adapters else BASE
