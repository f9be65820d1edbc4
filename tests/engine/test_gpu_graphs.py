"""Who decides whether decode steps are captured, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peft_serve.config import Settings
from peft_serve.engine.gpu_graphs import Mode, capturing_by, runner_maker, warm_up, why_not
from peft_serve.engine.gpu_kernels import GpuKernels
from peft_serve.metrics import Metrics
from peft_serve.model.base import ResidentBase
from peft_serve.model.runner import StepRunner
from peft_serve.model.step_graphs import Recorder, Replay
from tests.kernels.triton import interpreter
from tests.model.slow_tiles import SlowTiles
from tests.model.tape import TapeRecorder
from tests.model.tiny_models import tiny

pytest.importorskip("triton")

from peft_serve.kernels.triton.attention_tiles import Sizes
from peft_serve.kernels.triton.low_rank import LowRankKernel
from peft_serve.model.triton_attention import PlanAttention

pytestmark = pytest.mark.skipif(not interpreter.IS_INTERPRETED, reason="the interpreter is for a CPU")

CPU = torch.device("cpu")
KERNELS = GpuKernels(attention=SlowTiles(Sizes()), low_rank=LowRankKernel(CPU, num_slots=4))  # type: ignore[arg-type]


class Broken:
    def record(self, act: Callable[[], None]) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing")


def runner(recorder: Recorder) -> StepRunner:
    base = ResidentBase(tiny("llama"), name="llama")
    base.runs.attention.whole = PlanAttention(KERNELS.attention)
    capturing = capturing_by(recorder, base, KERNELS, max_rows=1, max_rank=8)
    return StepRunner(
        base, num_blocks=9, num_cross_blocks=0, block_size=4, adapters=lambda _: _none(), capturing=capturing
    )


def _none() -> Any:
    raise LookupError("no adapter is installed here")


def made(mode: Mode) -> StepRunner:
    base = ResidentBase(tiny("llama"), name="llama")
    make = runner_maker(Settings(cuda_graphs=mode), base, None, Metrics(), lambda _: None)
    return make(num_blocks=9, num_cross_blocks=0, block_size=4, adapters=lambda _: _none())


def test_a_base_on_a_cpu_has_none_and_says_so_where_it_is_to_have_them() -> None:
    assert made("auto").graphs is None
    assert made("off").graphs is None
    with pytest.raises(
        ValueError, match=r"--cuda-graphs on: the base is on a CPU.*--device cuda.*leave the option out"
    ):
        made("on")


@pytest.mark.parametrize(
    ("kernels", "generates", "reason"),
    [(None, True, "--gpu-kernels"), (KERNELS, False, "generates nothing"), (KERNELS, True, None)],
)
def test_a_gpu_is_not_enough(kernels: GpuKernels | None, generates: bool, reason: str | None) -> None:
    shape = SimpleNamespace(generates=generates, is_encoder=not generates)
    base: Any = SimpleNamespace(device=torch.device("cuda"), shape=shape)
    found = why_not(base, kernels)
    assert (found is None) if reason is None else reason in str(found)


def test_what_was_captured_at_start_is_told() -> None:
    said: list[str] = []
    times = iter(range(100))
    own = runner(TapeRecorder())
    warm_up("auto", own, said.append, clock=lambda: float(next(times)))
    assert own.graphs is not None
    assert len(own.graphs) == 2
    assert said == ["2 decode steps of the base captured in CUDA graphs, in 3.0 s"]


def test_a_base_that_cannot_be_captured_goes_on_without_or_not_at_all() -> None:
    said: list[str] = []
    own = runner(Broken())
    warm_up("auto", own, said.append)
    assert own.graphs is None
    (line,) = said
    assert line.startswith("no CUDA graphs, so decode steps are launched call by call: RuntimeError: operation not")
    with pytest.raises(ValueError, match="--cuda-graphs on: a decode step cannot be captured"):
        warm_up("on", runner(Broken()), said.append)


def test_decode_steps_are_counted_from_the_start() -> None:
    metrics = Metrics()
    metrics.decode.observe("replayed")
    lines = metrics.render().decode().splitlines()
    assert 'peft_serve_decode_steps_total{how="replayed"} 1.0' in lines
    assert 'peft_serve_decode_steps_total{how="eager"} 0.0' in lines
