"""Bases in 8 bits on a GPU: the kernel for their products, and its trial on numbers that are known otherwise.

Triton is imported here only where it is used. Whether the kernel is given to a base is decided by `gpu_kernels`.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from peft_serve.kernels.eight_bits import Code, Coded, coded, decoded
from peft_serve.model.base import ResidentBase
from peft_serve.model.eight_bits import EightBitProduct, eight_bit_layers

_NUM_IN: Final = 208  # steps of the kernel, and a part of one
_NUM_OUT: Final = 72
_NUM_TOKENS: Final = (3, 21)  # of one tile, and of two


def eight_bit_kernel(device: torch.device) -> EightBitProduct:
    """The kernel; nothing is compiled yet."""
    from peft_serve.kernels.triton.eight_bits import EightBitKernel

    return EightBitKernel(device)


def run_by_kernel(base: ResidentBase, kernel: EightBitProduct) -> int:
    """Have the base's layers of 8 bits multiply by the kernel from now on; how many there are."""
    layers = list(eight_bit_layers(base.model))
    for layer in layers:
        layer.run_by(kernel)
    return len(layers)


@torch.inference_mode()
def eight_bits_error(kernel: EightBitProduct, base: ResidentBase) -> float:
    """The largest error of products with weights like the base's, over the largest number; 0 where it has none."""
    codes = {layer.code for layer in eight_bit_layers(base.model)}
    return max((_error(kernel, base, code) for code in codes), default=0.0)


def _error(kernel: EightBitProduct, base: ResidentBase, code: Code) -> float:
    generator = torch.Generator().manual_seed(3)

    def small(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(base.dtype)

    own, bias_O = coded(small(_NUM_OUT, _NUM_IN), code), small(_NUM_OUT)
    exact_IO = decoded(own, torch.float32).double().t()
    weight = Coded(own.values_OI.to(base.device), own.steps_O.to(base.device), code)
    errors = []
    for num_tokens in _NUM_TOKENS:
        x_TI = small(num_tokens, _NUM_IN)
        exact_TO = x_TI.double() @ exact_IO + bias_O.double()
        ours_TO = kernel.multiply(x_TI.to(base.device), weight, bias_O.to(base.device)).cpu().double()
        errors.append(float((ours_TO - exact_TO).abs().max() / exact_TO.abs().max()))
    return max(errors)
