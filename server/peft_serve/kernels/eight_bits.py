"""Weights in 8 bits, one step (scale) for each output: W[o, i] = step[o] * value[o, i].

Values are whole numbers of -127 to 127, or floats of 4 exponent and 3 mantissa bits (e4m3, arXiv:2209.05433). Either
kind is kept as int8, a float by its bits: models ask for a weight's dtype before they multiply, and int8 is the one
that all of them leave alone. Steps have the digits of a bfloat16, so that a value times its step is exact in float32.

Shapes: `O` outputs, `I` inputs, `T` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import linear


class Code(StrEnum):
    """What the values of a weight are."""

    INT8 = "int8"
    FP8 = "fp8"  # e4m3


_LARGEST: Final = {Code.INT8: 127.0, Code.FP8: 448.0}
_REGISTERS: Final = 64  # values, at most, that a CPU multiplies at once


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A weight: values [O, I] as int8, steps [O] in float32."""

    values_OI: Tensor
    steps_O: Tensor
    code: Code

    @property
    def num_out(self) -> int:
        return self.values_OI.shape[0]

    @property
    def num_in(self) -> int:
        return self.values_OI.shape[1]


def coded(weight_OI: Tensor, code: Code) -> Coded:
    """The weight, rounded to the nearest values of its outputs' steps. ValueError where it is not finite."""
    whole_OI = weight_OI.detach().float()
    largest_O = whole_OI.abs().amax(dim=1)
    if not bool(largest_O.isfinite().all()):
        raise ValueError("it holds values that are not finite")
    steps_O = (largest_O / _LARGEST[code]).to(torch.bfloat16).float()
    steps_O = torch.where(steps_O > 0, steps_O, torch.ones_like(steps_O))  # nothing but zeros
    # A step that was rounded down lets the largest value stick out by less than half of one.
    scaled_OI = (whole_OI / steps_O[:, None]).clamp_(-_LARGEST[code], _LARGEST[code])
    if code is Code.INT8:
        return Coded(scaled_OI.round_().to(torch.int8), steps_O, code)
    return Coded(scaled_OI.to(torch.float8_e4m3fn).view(torch.int8), steps_O, code)


def decoded(weight: Coded, dtype: torch.dtype) -> Tensor:
    """The matrix [O, I] that a weight stands for, rounded to `dtype` once."""
    values_OI = weight.values_OI if weight.code is Code.INT8 else weight.values_OI.view(torch.float8_e4m3fn)
    if dtype is torch.bfloat16:  # which holds values and steps as they are
        return values_OI.to(dtype).mul_(weight.steps_O.to(dtype)[:, None])
    return values_OI.float().mul_(weight.steps_O[:, None]).to(dtype)


def is_torchs_own(weight: Coded, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch is to multiply by the values as they are stored: on a CPU, in bfloat16. It reads beyond the end of
    a row whose length is no multiple of its registers', and in float32 it takes longer than to decode the matrix."""
    is_served = device.type == "cpu" and dtype is torch.bfloat16 and weight.code is Code.INT8
    return is_served and weight.num_in % _REGISTERS == 0


def multiplied(x: Tensor, weight: Coded, bias_O: Tensor | None) -> Tensor:
    """x W^T + b of x [..., I], by torch: its own product with whole numbers where it has a good one, else with the
    decoded matrix."""
    if is_torchs_own(weight, x.device, x.dtype):
        steps_O = weight.steps_O.to(x.dtype)
        y_TO = torch._weight_int8pack_mm(x.reshape(-1, weight.num_in).contiguous(), weight.values_OI, steps_O)
        y_TO = y_TO if bias_O is None else y_TO.add_(bias_O)
        return y_TO.view(*x.shape[:-1], weight.num_out)
    return linear(x, decoded(weight, x.dtype), bias_O)
