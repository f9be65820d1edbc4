"""Who makes the runner of a server, with decode steps captured in CUDA graphs where they can be: decided at start.

They are where a GPU runs them by our own kernels, since what those are told of a step lies in tables that stay where
they are. Where the base alone cannot be captured, nothing is. Which steps have a graph is for `model.step_graphs`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal, Protocol

from peft_serve.adapters.primitives import Adapter
from peft_serve.core import AdapterId
from peft_serve.engine.gpu_kernels import GpuKernels
from peft_serve.model.base import ResidentBase
from peft_serve.model.carrier import Carrier
from peft_serve.model.cuda_graphs import CudaRecorder
from peft_serve.model.runner import StepRunner
from peft_serve.model.step_graphs import Capturing, Recorder
from peft_serve.model.triton_attention import PlanAttention

if TYPE_CHECKING:  # the check of a GPU runs where the packages that these need are not installed
    from peft_serve.config import Settings
    from peft_serve.metrics import Metrics

Mode = Literal["auto", "on", "off"]

ON_A_CPU: Final = "the base is on a CPU, and graphs are for GPUs; give --device cuda"
"""Why there can be no graphs where there is no GPU."""
_WARM_UP_S: Final = 30.0  # no further step is captured at start once this has passed


class MakeRunner(Protocol):
    """Makes the runner of one base; see `StepRunner`."""

    def __call__(
        self,
        *,
        num_blocks: int,
        num_cross_blocks: int,
        block_size: int,
        adapters: Callable[[AdapterId], Adapter],
        carrier: Carrier | None = None,
    ) -> StepRunner: ...


def runner_maker(
    settings: Settings,
    base: ResidentBase,
    kernels: GpuKernels | None,
    metrics: Metrics,
    say: Callable[[str], None],
) -> MakeRunner:
    """For a base that `kernels` run, if any do. ValueError where the settings insist on graphs that cannot be had."""
    mode, capturing = settings.cuda_graphs, None
    reason = "they are off" if mode == "off" else why_not(base, kernels)
    if reason is None:
        assert kernels is not None, "else there is a reason"
        recorder, told, was = CudaRecorder(base.device), metrics.decode.observe, base.runs.attention.whole
        capturing = capturing_by(
            recorder, base, kernels, max_rows=settings.max_rows, max_rank=settings.max_rank, told=told
        )
        if not isinstance(was, PlanAttention):
            say("decode steps are captured with our own attention, which runs prompts too; --cuda-graphs off: torch's")
    elif mode == "on":
        raise ValueError(f"--cuda-graphs on: {reason}; or leave the option out")

    def make(
        *,
        num_blocks: int,
        num_cross_blocks: int,
        block_size: int,
        adapters: Callable[[AdapterId], Adapter],
        carrier: Carrier | None = None,
    ) -> StepRunner:
        runner = StepRunner(
            base,
            num_blocks=num_blocks,
            num_cross_blocks=num_cross_blocks,
            block_size=block_size,
            adapters=adapters,
            carrier=carrier,
            capturing=capturing,
        )
        warm_up(mode, runner, say)
        return runner

    return make


def why_not(base: ResidentBase, kernels: GpuKernels | None) -> str | None:
    """Why there can be no graphs, None where they may be tried."""
    if base.device.type != "cuda":
        return ON_A_CPU
    if kernels is None:
        return "graphs need our own GPU kernels, which do not run here; see --gpu-kernels"
    if not base.shape.generates or base.shape.is_encoder:
        return "the base generates nothing, and graphs are for the steps in which answers grow"
    return None


def capturing_by(
    recorder: Recorder,
    base: ResidentBase,
    kernels: GpuKernels,
    *,
    max_rows: int,
    max_rank: int,
    told: Callable[[str], None] = lambda _: None,
) -> Capturing:
    """How the decode steps of a base that the kernels run are captured. Its attention is our own kernel from then on,
    in every step: a row would else have other bits where it shares a step with a prompt, which is not captured."""
    attention = PlanAttention(kernels.attention)
    base.runs.attention.whole = attention
    return Capturing(
        recorder=recorder, attention=attention, tables=kernels.held(max_rank), max_rows=max_rows, told=told
    )


def warm_up(
    mode: Mode, runner: StepRunner, say: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic
) -> None:
    """Capture the steps of the base alone, before there are any, and tell how that went. Where it cannot be done the
    runner goes on without, or ValueError where the mode insists."""
    if runner.graphs is None:
        return
    began_s = clock()
    reason = runner.graphs.warm_up(until=lambda: clock() - began_s > _WARM_UP_S)
    if reason is None:
        say(f"{len(runner.graphs)} decode steps of the base captured in CUDA graphs, in {clock() - began_s:.1f} s")
        return
    if mode == "on":
        raise ValueError(f"--cuda-graphs on: a decode step cannot be captured ({reason}); or leave the option out")
    runner.do_without_graphs()
    say(f"no CUDA graphs, so decode steps are launched call by call: {reason}")
