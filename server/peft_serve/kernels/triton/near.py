"""Where a kernel runs: Triton launches on torch's current device, which need not be the one that the tensors are on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def near(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch where this tensor is, for the length of the context."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
