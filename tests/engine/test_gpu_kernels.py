"""GPU kernels are given to a base where they prove right, and plain torch goes on where not.

Kernels run in Triton's interpreter, on the CPU: what is on trial here is who decides, and that tokens stay the same.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from peft_serve.config import Settings
from peft_serve.engine import gpu_kernels
from peft_serve.engine.gpu_kernels import GpuKernels, NoGpuKernels, load_kernels, speed_up
from peft_serve.kernels.low_rank import Add, Segments
from peft_serve.model.base import ResidentBase
from tests.kernels.triton import interpreter
from tests.model.driver import Driver, Job
from tests.model.tiny_models import tiny

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not interpreter.IS_INTERPRETED, reason="the interpreter is for a CPU")


def interpreted(device: torch.device) -> GpuKernels:
    from peft_serve.kernels.triton.attention import TiledAttention
    from peft_serve.kernels.triton.low_rank import LowRankKernel

    return GpuKernels(attention=TiledAttention(), low_rank=LowRankKernel(device, num_slots=4))


class Wrong:
    """Low-rank kernels that forget the last adapter of a step."""

    def __init__(self, right: GpuKernels) -> None:
        self._right = right.low_rank

    def layer(self, num_in: int, num_out: int, dtype: torch.dtype) -> WrongLayer:
        return WrongLayer(self._right.layer(num_in, num_out, dtype))


class WrongLayer:
    def __init__(self, right: object) -> None:
        self._right = right

    def __getattr__(self, name: str) -> object:
        return getattr(self._right, name)

    def op(self, segments: Segments) -> Add:
        fewer: Add = self._right.op(Segments(segments.each[:-1], segments.num_tokens))  # type: ignore[attr-defined]
        return fewer


def given(mode: gpu_kernels.Mode, load: object = interpreted) -> tuple[ResidentBase, GpuKernels | None, list[str]]:
    said: list[str] = []
    base = ResidentBase(tiny("llama"), name="llama")
    return base, speed_up(mode, base, said.append, load=load), said  # type: ignore[arg-type]


def answers(base: ResidentBase) -> list[list[int]]:
    jobs = [Job(prompt=(7, 8, 9, 5, 6), num_new=2), Job(prompt=(31,), num_new=2)]
    Driver(base, seed=1).finish(jobs)
    return [job.output for job in jobs]


def test_a_base_with_kernels_gives_the_tokens_of_one_without() -> None:
    base, kernels, said = given("on")
    assert kernels is not None
    assert base.runs.attention.whole is not None
    assert said == ["attention and low-rank terms run by our own GPU kernels"]
    plain, none, silent = given("off")
    assert (none, silent, plain.runs.attention.whole) == (None, [], None)
    assert answers(base) == answers(plain)


def test_kernels_that_compute_something_else_are_not_used() -> None:
    def wrong(device: torch.device) -> GpuKernels:
        right = interpreted(device)
        return replace(right, low_rank=Wrong(right))  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"--gpu-kernels on: low-rank terms come out wrong on this GPU, by .*leave"):
        given("on", wrong)


def test_kernels_that_break_when_they_are_tried_out_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(kernels: GpuKernels, base: ResidentBase) -> float:
        raise RuntimeError("ptxas\nand much more")

    monkeypatch.setattr(gpu_kernels, "attention_error", breaks)
    with pytest.raises(ValueError, match=r"attention cannot be tried out \(RuntimeError: ptxas\)"):
        given("on")


def test_wrong_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    base, kernels = given("off")[0], interpreted(torch.device("cpu"))
    assert gpu_kernels.attention_error(kernels, base) < 1e-6
    attend = kernels.attention.attend

    def shifted(*args: object, **kwargs: object) -> Tensor:
        return attend(*args, **kwargs).roll(1, dims=0)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels.attention, "attend", shifted)
    assert gpu_kernels.attention_error(kernels, base) > 0.1


def test_a_base_on_a_cpu_is_left_alone_unless_kernels_are_insisted_on() -> None:
    base, kernels, said = given("auto")
    assert (kernels, said, base.runs.attention.whole) == (None, [], None)
    with pytest.raises(ValueError, match=r"--gpu-kernels on: the base is on a CPU.*--device cuda"):
        given("on", load_kernels)


def test_without_triton_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "find_spec", lambda _: None)
    with pytest.raises(NoGpuKernels, match="the package triton is not installed"):
        load_kernels(torch.device("cuda"))


def test_the_setting_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().gpu_kernels == "auto"
    monkeypatch.setitem(os.environ, "PEFT_SERVE_GPU_KERNELS", "off")
    assert Settings().gpu_kernels == "off"
