"""Mixers, bottlenecks and gated prompts on a GPU: kernels in the memory of those for low-rank terms, and their trial.

Triton is imported here only where it is used. Who gets the kernels is decided by `gpu_kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from peft_serve.kernels.bottleneck import Squeeze
from peft_serve.kernels.low_rank import Segments
from peft_serve.model.base import ResidentBase
from peft_serve.model.terms.term import OtherKernels

if TYPE_CHECKING:
    from peft_serve.kernels.triton.memory import DeviceMemory

_RUNS: Final = ((1, 0, 1), (2, 1, 9), (3, 10, 13))
_NUM_TOKENS: Final = 13
_SIZE: Final = 48
_SIDES: Final = (16, 24, 6)  # of the blocks, and features of the bottlenecks, of slots 1 to 3


def other_kernels(memory: DeviceMemory) -> OtherKernels:
    """The kernels for mixers, bottlenecks and gated prompts; nothing is compiled yet."""
    from peft_serve.kernels.triton.bottleneck import BottleneckKernel
    from peft_serve.kernels.triton.gated import GatedKernel
    from peft_serve.kernels.triton.mixing import MixingKernel

    return OtherKernels(mixing=MixingKernel(memory), bottlenecks=BottleneckKernel(memory), gated=GatedKernel(memory))


@torch.inference_mode()
def others_error(memory: DeviceMemory, base: ResidentBase) -> float:
    """The largest error of a few adapters' mixers, bottlenecks and gated prompts, over the largest number."""
    kernels, generator = other_kernels(memory), torch.Generator().manual_seed(2)
    mixing = kernels.mixing.layer(_SIZE, base.dtype)
    assert kernels.bottlenecks is not None, "GPUs have one"
    bottlenecks = kernels.bottlenecks.layer(_SIZE, base.dtype)

    def small(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(base.dtype)

    x_TD = small(_NUM_TOKENS, _SIZE)
    mixed_TD, lifted_TD = x_TD.double(), torch.zeros(_NUM_TOKENS, _SIZE, dtype=torch.float64)
    for (slot, first, last), side in zip(_RUNS, _SIDES, strict=True):
        blocks_NKK, squeeze = small(_SIZE // side, side, side), _squeeze(small, side)
        mixing.put(slot, blocks_NKK)
        bottlenecks.put(slot, squeeze)
        own_ND = x_TD[first:last].double()
        own_in_blocks = own_ND.view(last - first, -1, side)
        mixed_TD[first:last] = torch.einsum("tnk,nkj->tnj", own_in_blocks, blocks_NKK.double()).flatten(1)
        low_NB = torch.relu(own_ND @ squeeze.down_BD.double().t() + squeeze.down_bias_B.double())
        high_ND = low_NB @ squeeze.up_DB.double().t() + squeeze.up_bias_D.double()
        lifted_TD[first:last] = squeeze.scale_D.double() * high_ND
    segments, given_TD = Segments(_RUNS, _NUM_TOKENS), x_TD.to(base.device)
    ours_TD = given_TD.clone()
    mixing.op(segments)(ours_TD, given_TD)
    own_T = torch.tensor([token for _, first, last in _RUNS for token in range(first, last)])
    ours_ND = bottlenecks.op(segments, "relu")(given_TD).cpu()[own_T]
    for slot, _, _ in _RUNS:
        mixing.drop(slot)
        bottlenecks.drop(slot)
    errors = _over_largest(ours_TD, mixed_TD), _over_largest(ours_ND, lifted_TD[own_T])
    return max(*errors, _gated_error(kernels, small, base))


def _gated_error(kernels: OtherKernels, small: Callable[..., Tensor], base: ResidentBase) -> float:
    assert kernels.gated is not None, "GPUs have one"
    num_heads, size = 2, _SIZE // 2
    prompts = kernels.gated.layer(num_heads, size, base.dtype)
    q_TQD, o_TQD = small(_NUM_TOKENS, num_heads, size), small(_NUM_TOKENS, num_heads, size)
    exact_TQD = o_TQD.double()
    for (slot, first, last), num_own, num_keys in zip(_RUNS, (1, 2, 1), (20, 3, 1), strict=True):
        keys_HMD, values_HMD, gate = small(num_own, num_keys, size), small(num_own, num_keys, size), small(1)
        prompts.put(slot, keys_HMD, values_HMD, gate)
        keys, values = (each.double().expand(num_heads, -1, -1) for each in (keys_HMD, values_HMD))
        scores = torch.einsum("tqd,qmd->tqm", q_TQD[first:last].double(), keys) * size**-0.5
        exact_TQD[first:last] += gate.double() * torch.einsum("tqm,qmd->tqd", scores.softmax(-1), values)
    ours_TQD = o_TQD.to(base.device, copy=True)
    prompts.op(Segments(_RUNS, _NUM_TOKENS))(ours_TQD, q_TQD.to(base.device))
    for slot, _, _ in _RUNS:
        prompts.drop(slot)
    return _over_largest(ours_TQD, exact_TQD)


def _squeeze(small: Callable[..., Tensor], size: int) -> Squeeze:
    return Squeeze(
        down_BD=small(size, _SIZE),
        down_bias_B=small(size),
        up_DB=small(_SIZE, size),
        up_bias_D=small(_SIZE),
        scale_D=small(_SIZE),
    )


def _over_largest(ours: Tensor, exact: Tensor) -> float:
    return float((ours.cpu().double() - exact).abs().max() / exact.abs().max())
