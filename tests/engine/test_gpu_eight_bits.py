"""The kernel for weights of 8 bits is tried out and given to a base, in Triton's interpreter."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from peft_serve.engine import gpu_kernels
from peft_serve.engine.gpu_eight_bits import eight_bit_kernel, eight_bits_error, run_by_kernel
from peft_serve.engine.gpu_kernels import GpuKernels, speed_up
from peft_serve.kernels.eight_bits import Code, Coded
from peft_serve.model.base import ResidentBase
from peft_serve.model.eight_bits import store_in_eight_bits
from tests.kernels.triton.interpreter import IS_INTERPRETED
from tests.model.driver import Driver, random_jobs
from tests.model.tiny_models import VOCAB, tiny

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="the tiny model is on a CPU")

CPU = torch.device("cpu")


class Doubles:
    """A kernel that is off by a factor."""

    def multiply(self, x: Tensor, weight: Coded, bias_O: Tensor | None) -> Tensor:
        return 2 * eight_bit_kernel(CPU).multiply(x, weight, bias_O)


def base_in(code: Code | None) -> ResidentBase:
    model = tiny("llama")
    if code is not None:
        store_in_eight_bits(model, code, CPU)
    return ResidentBase(model, name="tiny")


def interpreted(device: torch.device) -> GpuKernels:
    from peft_serve.kernels.triton.attention import TiledAttention
    from peft_serve.kernels.triton.low_rank import LowRankKernel

    return GpuKernels(attention=TiledAttention(), low_rank=LowRankKernel(device, num_slots=4))


@pytest.mark.parametrize("code", list(Code))
def test_the_trial_finds_a_kernel_that_is_wrong(code: Code) -> None:
    base = base_in(code)
    assert eight_bits_error(eight_bit_kernel(CPU), base) < 2e-6
    assert eight_bits_error(Doubles(), base) > 0.4


def test_a_base_in_full_has_nothing_to_try() -> None:
    assert eight_bits_error(Doubles(), base_in(None)) == 0.0
    assert run_by_kernel(base_in(None), Doubles()) == 0


def test_a_base_is_run_by_the_kernel_and_says_the_same() -> None:
    outputs = []
    for load in (None, interpreted):
        base = base_in(Code.FP8)
        if load is not None:
            assert speed_up("on", base, lambda _: None, load=load) is not None
            assert run_by_kernel(base, Doubles()) == 14, "every layer takes the kernel it is given"
            run_by_kernel(base, eight_bit_kernel(CPU))
        jobs = random_jobs(random.Random(3), count=1, vocab=VOCAB)
        jobs[0].num_new = 2
        Driver(base, seed=1).finish(jobs)
        outputs.append(jobs[0].output)
    assert outputs[0] == outputs[1]


def test_a_base_gets_no_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "eight_bit_kernel", lambda _: Doubles())
    with pytest.raises(ValueError, match=r"--gpu-kernels on: products of 8 bits come out wrong on this GPU, by"):
        speed_up("on", base_in(Code.INT8), lambda _: None, load=interpreted)
