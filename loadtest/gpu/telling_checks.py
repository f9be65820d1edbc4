"""Tokens that are told while the next step is computed, as the engine tells them: whose they are, which, in what order.

The scheduler, the engine's stepping and its outbox, without its thread. Before each step the device is given other
work, so that whoever reads a step's tokens too early reads something else; and what is told within a step takes and
gives back pinned memory, so that a copy which is still on its way would be written over.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import torch

from loadtest.gpu.ground import Ground
from loadtest.gpu.kernels import kernels_for
from loadtest.gpu.random_adapters import lora
from loadtest.gpu.results import Check, Found
from loadtest.gpu.timing import filler
from loadtest.gpu.tiny import base_on, has_triton, module
from peft_serve.adapters.primitives import Adapter
from peft_serve.core import (
    BASE,
    AdapterId,
    Event,
    FinishEvent,
    FinishReason,
    Request,
    RequestId,
    SamplingParams,
    TokenEvent,
)
from peft_serve.engine.gpu_graphs import capturing_by
from peft_serve.engine.outbox import Outbox
from peft_serve.engine.stepping import Stepping
from peft_serve.model.base import ResidentBase
from peft_serve.model.cuda_graphs import CudaRecorder
from peft_serve.model.runner import StepRunner
from peft_serve.model.step_graphs import Capturing
from peft_serve.model.triton_attention import PlanAttention
from peft_serve.scheduling.blocks import BlockLedger
from peft_serve.scheduling.limits import Limits
from peft_serve.scheduling.scheduler import Scheduler
from peft_serve.scheduling.slots import SlotLedger

_CPU: Final = torch.device("cpu")
_NUM_REQUESTS: Final = 12
_MAX_ROWS: Final = 4  # fewer than there are requests: some begin when others end
_BLOCK_SIZE: Final = 4
_NUM_BLOCKS: Final = 200
_PINNED: Final = (8, 64, 512, 4096)  # numbers of 8 bytes, as tokens of a step and what is beside them


def telling(ground: Ground) -> Found:
    """Greedy tokens in float32, on the device and apart, against the CPU, which is waited for."""
    make = partial(module("model.tiny_models").tiny, "llama")
    plain, base = base_on(make, _CPU, kernels="off"), base_on(make, ground.device, kernels="off")
    adapters = {each.id: each for each in (lora(plain, name, rank, seed=rank) for name, rank in (("a", 4), ("b", 9)))}
    requests = _requests(4 if ground.is_quick else _NUM_REQUESTS, [BASE, *adapters])
    expected, _ = _Told.by(_runner(plain, adapters, works_apart=False), adapters, requests)
    fill = filler(ground)

    def meanwhile() -> None:
        if ground.is_gpu:
            for size in _PINNED:
                torch.full((size,), -1.0, dtype=torch.float64).pin_memory()

    runner = _runner(base, adapters, works_apart=True, capturing=_capturing(ground, base))
    found, told = _Told.by(runner, adapters, requests, before=fill, meanwhile=meanwhile)
    same = [found.get(request.id) == expected[request.id] for request in requests]
    return Found(
        checks=(
            Check(name="tokens that are told", passed=all(same), note=f"{sum(same)} of {len(same)} answers"),
            Check(name="each answer's tokens in their order, its end behind them", passed=told.in_order),
            Check(
                name="steps tell while the next one is computed",
                passed=told.num_within > 0,
                note=f"{told.num_within} tokens of {sum(map(len, found.values()))}",
            ),
        )
    )


@dataclass(slots=True)
class _Told:
    """What was told, by request, and when."""

    tokens: dict[RequestId, list[int]] = field(default_factory=dict)
    ended: set[RequestId] = field(default_factory=set)
    in_order: bool = True
    is_computing: bool = False
    num_within: int = 0

    @classmethod
    def by(
        cls,
        runner: StepRunner,
        adapters: dict[AdapterId, Adapter],
        requests: Sequence[Request],
        *,
        before: Callable[[], object] = lambda: None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> tuple[dict[RequestId, list[int]], "_Told"]:
        """All requests, to their end, with something done before each step and within it."""
        told, outbox, scheduler = cls(), Outbox(), _scheduler(len(adapters))
        outbox.connect(told.hear)
        stepping = Stepping(scheduler, runner)

        def within() -> None:
            told.is_computing = True
            outbox.tell_within_a_step()
            told.is_computing = False
            meanwhile()

        is_overlapped = stepping.overlap(within)
        for request in requests:
            scheduler.submit(request)
        while scheduler.has_work:
            for adapter in scheduler.take_loads():
                scheduler.adapter_ready(adapter, adapters[adapter].footprint(is_encoder_decoder=False))
            step = scheduler.plan()
            if step is None:
                raise RuntimeError("no request can run: the sizes do not fit together")
            before()
            outbox.hold(stepping.run(step))
            outbox.require_told()
            if not (is_overlapped and scheduler.has_work):
                outbox.tell()
        return told.tokens, told

    def hear(self, events: Sequence[Event]) -> None:
        """As the engine's client does."""
        for event in events:
            if isinstance(event, TokenEvent):
                self.tokens.setdefault(event.request, []).append(event.token)
                self.num_within += self.is_computing
            elif isinstance(event, FinishEvent):
                if event.reason is FinishReason.FAILED:
                    raise RuntimeError(f"a request failed: {event.error}")
                self.ended.add(event.request)
                continue
            self.in_order &= event.request not in self.ended


def _requests(count: int, adapters: Sequence[AdapterId]) -> list[Request]:
    """Of mixed lengths, which take turns among the adapters."""
    return [
        Request(
            id=RequestId(str(number)),
            adapter=adapters[number % len(adapters)],
            prompt=tuple(5 + (7 * number + 3 * place) % 50 for place in range(1 + 5 * number % 13)),
            sampling=SamplingParams(max_new_tokens=3 + number % 7, ignore_eos=True),
            arrival_s=0.0,
        )
        for number in range(count)
    ]


def _scheduler(num_slots: int) -> Scheduler:
    limits = Limits(
        max_rows=_MAX_ROWS,
        max_step_tokens=16,
        max_step_adapters=_MAX_ROWS,
        max_step_rank=1 << 20,
        max_queue=_NUM_REQUESTS,
        block_size=_BLOCK_SIZE,
        max_context=64,
        prefix_caching=False,
        max_loads=num_slots,
    )
    slots = SlotLedger(num_slots=num_slots, max_bytes=1 << 30)
    blocks = BlockLedger(num_blocks=_NUM_BLOCKS, block_size=_BLOCK_SIZE)
    return Scheduler(limits, slots, blocks, None, lambda: 0.0)


def _runner(
    base: ResidentBase,
    adapters: dict[AdapterId, Adapter],
    *,
    works_apart: bool,
    capturing: Capturing | None = None,
) -> StepRunner:
    return StepRunner(
        base,
        num_blocks=_NUM_BLOCKS,
        num_cross_blocks=0,
        block_size=_BLOCK_SIZE,
        adapters=adapters.__getitem__,
        capturing=capturing,
        works_apart=works_apart,
    )


def _capturing(ground: Ground, base: ResidentBase) -> Capturing | None:
    """On a GPU with our kernels steps are replayed, as a server's are."""
    if not (ground.is_gpu and has_triton()):
        return None
    kernels = kernels_for(ground)
    base.runs.attention.whole = PlanAttention(kernels.attention)
    base.adapted.run_low_rank_by(kernels.low_rank)
    return capturing_by(CudaRecorder(ground.device), base, kernels, max_rows=_MAX_ROWS, max_rank=16)
