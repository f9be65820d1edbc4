"""Masks over the vocabulary: what a constraint forbids is at minus infinity before anything else is done.

Shapes: `N` rows, `V` vocabulary, `M` constrained rows, `B` bytes of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from peft_serve.core import Draw
from peft_serve.model.sending import sent

_NEVER = float("-inf")


def masked(logits_NV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The logits, in rows with a mask only those of allowed ids; the very tensor if no row has one.

    A row whose token is forced is left as it is. Ids beyond the end of a mask are forbidden.
    """
    assert len(draws) == logits_NV.shape[0], "a draw for each row"
    masks = {i: d.allowed for i, d in enumerate(draws) if d.allowed is not None and d.forced is None}
    if not masks:
        return logits_NV
    forbidden_MV = _forbidden(list(masks.values()), logits_NV.shape[1])
    if logits_NV.device.type == "cuda":
        forbidden_MV = forbidden_MV.pin_memory().to(logits_NV.device, non_blocking=True)
    if len(masks) == len(draws):
        return logits_NV.masked_fill(forbidden_MV, _NEVER)
    (rows_M,) = sent([list(masks)], logits_NV.device)
    result_NV = logits_NV.clone()
    result_NV[rows_M] = logits_NV[rows_M].masked_fill_(forbidden_MV, _NEVER)
    return result_NV


def _forbidden(masks: Sequence[bytes], size: int) -> Tensor:
    """One truth for each id that a mask does not allow [M, size]. NumPy unpacks bits many times faster than torch."""
    num_bytes = -(-size // 8)
    joined = b"".join(mask[:num_bytes].ljust(num_bytes, b"\0") for mask in masks)
    packed_MB = ~numpy.frombuffer(joined, dtype=numpy.uint8).reshape(len(masks), num_bytes)
    bits_MV = numpy.unpackbits(packed_MB, axis=1, count=size, bitorder="little")
    return torch.from_numpy(bits_MV).bool()
