"""Linear layers on a CPU, run from a copy of the weight in the order in which a product reads it.

Our own kernels do it where they are to be had (`kernels.few_rows`, docs/decisions/0010-cpu-kernels.md), and their copy
takes the plain weight's place (`packed_weight`). This module has the other way, the blocked layout of oneDNN, and says
which weights gain from which.

A plain product packs its weight anew at every call, which is most of its time when it has a few rows only: packing
once makes a decode step 1.3 (16 rows) to 2.6 times (4 rows) as fast and costs a second copy of the weights
(docs/decisions/0004-packed-weights.md). oneDNN does not give weights back, so that the model's own stay as they are,
for whoever reads them; a single row reads them too, because a product of a matrix and a vector packs nothing and reads
each weight once.

A bfloat16 weight is packed as float32, for CPUs without instructions for bfloat16: torch computes such products in
float32 there and rounds what comes out, row by row and slowly. The copy does the same, many rows at a time
(docs/decisions/0008-the-step.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import linear

from peft_serve.model.packed_weight import WeightPlaces

FEWEST_WEIGHTS: Final = 1 << 17  # a call of the packed product costs more than it saves on a smaller matrix
Pack = Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]]
"""Makes x -> x W^T + b of a weight [O, I] and a bias."""
Places = WeightPlaces | None
"""Where packed weights take the place of plain ones; None: both are kept."""

_LAYOUT_TOKENS: Final = 16  # the layout chosen for so many rows is the best or close to it from 1 to 512
_MAX_SHARE: Final = 0.25  # of the memory that is free


def packed_linear(weight_OI: Tensor, bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x -> x W^T + b from a packed copy of W. Raises RuntimeError where `can_pack` is false."""
    ops: Any = torch.ops.mkldnn
    weight, bias = weight_OI.detach(), None if bias_O is None else bias_O.detach()
    dtype, num_in = weight.dtype, weight.shape[1]
    packed = ops._reorder_linear_weight(weight.float().contiguous(), _LAYOUT_TOKENS)
    packed_bias = None if bias is None else bias.float()

    def forward(x: Tensor) -> Tensor:
        if x.numel() == num_in:
            return linear(x, weight, bias)
        y: Tensor = ops._linear_pointwise(x.float(), packed, packed_bias, "none", [], "")
        return y.to(dtype)

    return forward


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch packs weights of this kind, and to some use on this CPU."""
    if device.type != "cpu" or not bool(torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return False
    ops = torch.ops.mkldnn
    if not hasattr(ops, "_reorder_linear_weight") or not hasattr(ops, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and not _has_bfloat16_instructions())


def gains_from_kernels(device: torch.device, dtype: torch.dtype, *, has_tiles: bool, is_always: bool = False) -> bool:
    """Whether our own kernels compute products of this kind, and faster than torch or because they are asked for.

    `has_tiles`: they multiply bfloat16 by the CPU's matrix unit. By widened numbers they are no faster, for long
    prompts, than torch where a CPU has other instructions for bfloat16.
    """
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    return dtype == torch.float32 or has_tiles or is_always or not _has_bfloat16_instructions()


def _has_bfloat16_instructions() -> bool:
    """As far as torch tells."""
    ops = torch.ops.mkldnn
    return not hasattr(ops, "_is_mkldnn_bf16_supported") or bool(ops._is_mkldnn_bf16_supported())


def is_worth_its_room(num_bytes: int, dtype: torch.dtype) -> bool:
    """Whether packed weights are worth their memory unasked: the copy takes a modest share of what is free.

    Weights in bfloat16 were chosen to save memory, and a copy of them takes twice as much again.
    """
    if dtype != torch.float32:
        return False
    try:
        free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return False
    return num_bytes <= _MAX_SHARE * free_bytes
