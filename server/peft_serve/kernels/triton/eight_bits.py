"""Products with weights of 8 bits on a GPU: those of few tokens read each value once, as it is stored.

What bounds a decode step is reading the weights, and here they are half of what they are in bfloat16. Products of many
tokens are bound by arithmetic: for these the matrix is decoded once and multiplied by torch.

Shapes: `T` tokens, `I` inputs, `O` outputs.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
from torch import Tensor

from peft_serve.kernels.eight_bits import Code, Coded, multiplied
from peft_serve.kernels.triton.eight_bits_kernels import multiply
from peft_serve.kernels.triton.near import near
from peft_serve.kernels.triton.shrinking import DTYPES, operand

MOST_TOKENS: Final = 64
"""Of a product by this kernel: a guess, which `gpu-check` is there to replace."""

_FEWEST_TOKENS: Final = 16  # that a tensor core multiplies
_MOST_AT_ONCE: Final = 32
_SMALL: Final = 2048  # outputs, up to which programs take fewer of them, so that there are enough programs
_LARGE: Final = 8192
_FLOAT_CAPABILITY: Final = (8, 9)  # which computes with floats of 8 bits


class EightBitKernel:
    """The kernel on one device."""

    def __init__(self, device: torch.device, *, most_tokens: int = MOST_TOKENS) -> None:
        self._most_tokens = most_tokens
        self._has_float = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FLOAT_CAPABILITY

    def multiply(self, x: Tensor, weight: Coded, bias_O: Tensor | None) -> Tensor:
        """x W^T + b of x [..., I], a new tensor; the bias is of x's type."""
        num_tokens = x.numel() // weight.num_in
        if num_tokens > self._most_tokens or x.dtype not in DTYPES:
            return multiplied(x, weight, bias_O)
        y = x.new_empty(*x.shape[:-1], weight.num_out)
        if num_tokens:
            self._launch(x.reshape(num_tokens, weight.num_in).contiguous(), weight, bias_O, y)
        return y

    def _launch(self, x_TI: Tensor, weight: Coded, bias_O: Tensor | None, y: Tensor) -> None:
        num_tokens, num_out = len(x_TI), weight.num_out
        columns = 16 if num_out <= _SMALL else 32 if num_out <= _LARGE else 64
        tokens = _FEWEST_TOKENS if num_tokens <= _FEWEST_TOKENS else _MOST_AT_ONCE
        is_wide = x_TI.dtype is torch.float32
        with near(x_TI):
            multiply[triton.cdiv(num_out, columns), triton.cdiv(num_tokens, tokens)](
                x_TI,
                weight.values_OI,
                weight.steps_O,
                weight.steps_O if bias_O is None else bias_O,
                y,
                num_tokens,
                weight.num_in,
                num_out,
                TOKENS=tokens,
                COLUMNS=columns,
                STEP=64 if is_wide else 128,
                IS_FLOAT=weight.code is Code.FP8,
                HAS_FLOAT=self._has_float,
                HAS_BIAS=bias_O is not None,
                OPERAND=operand(x_TI.dtype),
                num_stages=2 if is_wide else 4,
            )
