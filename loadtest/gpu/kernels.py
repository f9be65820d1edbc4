"""Our GPU kernels for parts that try them out by themselves; on a CPU the same ones, by Triton's interpreter."""

from typing import TYPE_CHECKING

import torch

from loadtest.gpu.ground import Ground
from loadtest.gpu.tiny import module
from peft_serve.engine.gpu_kernels import GpuKernels, load_kernels

if TYPE_CHECKING:
    from peft_serve.kernels.triton.low_rank import LowRankKernel


def kernels_for(ground: Ground) -> GpuKernels:
    """Raises `NoGpuKernels` with the reason where there are none."""
    if ground.is_gpu:
        return load_kernels(ground.device)
    module("kernels.triton.interpreter")  # lets Triton run here
    from peft_serve.kernels.triton.attention import TiledAttention
    from peft_serve.kernels.triton.low_rank import LowRankKernel

    return GpuKernels(attention=TiledAttention(), low_rank=LowRankKernel(torch.device("cpu"), num_slots=8))


def grouped_for(ground: Ground) -> "LowRankKernel":
    """Low-rank terms whose long runs are torch's grouped products."""
    from peft_serve.kernels.triton.low_rank import LongRuns, LowRankKernel

    return LowRankKernel(ground.device, num_slots=8, long_runs=LongRuns.GROUPED)
