"""The bytes of an adapter, counted while it is compiled: a few numbers in a file can stand for full matrices.

Stopping at the limit, and not after the last site, is what keeps a small upload from filling the host's memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_serve.adapters.primitives import Edit, tensors_of
from peft_serve.adapters.records import WEIGHTS_FILE
from peft_serve.errors import AdapterInvalid, Refusal


class Spending:
    """Counts what edits hold in the base's type; a tensor that several of them share is counted once."""

    def __init__(self, dtype: torch.dtype, max_bytes: int) -> None:
        self._itemsize = dtype.itemsize
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._counted: dict[int, Tensor] = {}  # by identity; kept, so that no identity is given out again

    def add(self, edit: Edit) -> None:
        """Raises `AdapterInvalid` when that is more than the adapter may have."""
        for tensor in tensors_of(edit):
            if id(tensor) not in self._counted:
                self._counted[id(tensor)] = tensor
                itemsize = self._itemsize if tensor.is_floating_point() else tensor.element_size()
                self._num_bytes += tensor.numel() * itemsize
        if self._num_bytes > self._max_bytes:
            reason = f"takes more than {self._max_bytes} bytes when compiled, which is all this server takes"
            raise AdapterInvalid(
                [Refusal(WEIGHTS_FILE, f"{reason} (the smaller of --max-adapter-bytes and --device-adapter-bytes)")]
            )
