"""Linear layers on a CPU, run from a copy of the weight in the blocked layout that oneDNN computes in.

A plain product packs its weight anew at every call, which is most of its time when it has a few rows only: packing
once makes a decode step 1.3 (16 rows) to 2.6 times (4 rows) as fast and costs a second copy of the weights
(docs/decisions/0004-packed-weights.md). The model's own weights stay as they are, for whoever reads them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

_LAYOUT_TOKENS: Final = 16  # the layout chosen for so many rows is the best or close to it from 1 to 512
_MAX_SHARE: Final = 0.25  # of the memory that is free


def packed_linear(weight_OI: Tensor, bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x -> x W^T + b from a packed copy of W. Raises RuntimeError where `can_pack` is false."""
    ops: Any = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(weight_OI.detach().contiguous(), _LAYOUT_TOKENS)
    bias = None if bias_O is None else bias_O.detach()

    def forward(x: Tensor) -> Tensor:
        y: Tensor = ops._linear_pointwise(x, packed, bias, "none", [], "")
        return y

    return forward


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch packs weights of this kind, and to some use."""
    if device.type != "cpu" or dtype != torch.float32:
        return False
    has_ops = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_ops and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def has_room(num_bytes: int) -> bool:
    """Whether a second copy of the weights takes a modest share of the free memory."""
    try:
        free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return False
    return num_bytes <= _MAX_SHARE * free_bytes
