"""Mixers of features, many adapters in one call: pure functions of tensors, none of them in place; and what a kernel
that takes their place looks like.

Shapes: `G` runs of one length, `P` tokens of each, `n` blocks of size `k`, `D` = n k features, `N` tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from peft_serve.kernels.low_rank import Segments

Mix = Callable[[Tensor, Tensor], object]
"""(y [T, D], x [T, D], other memory) -> y has the mixed x of every token whose adapter mixes; the others stay."""


class Blocks(Protocol):
    """The block-diagonal maps of one layer's adapters by slot, and the ops of a kernel that reads them."""

    def put(self, slot: int, blocks_NKK: Tensor) -> None: ...

    def drop(self, slot: int) -> None: ...

    def op(self, segments: Segments) -> Mix: ...


class MixingKernels(Protocol):
    """Who makes them."""

    def serves(self, like: Tensor) -> bool: ...

    def layer(self, num_features: int, dtype: torch.dtype) -> Blocks: ...


def mixed_by_blocks(x_GPD: Tensor, blocks_GNKK: Tensor) -> Tensor:
    """x -> concat_j(x_j R_j) for each run with its own blocks, [G, P, D]: one batched product over G n blocks."""
    num_runs, num_places, _ = x_GPD.shape
    num_blocks, size = blocks_GNKK.shape[1:3]
    x_BPK = x_GPD.view(num_runs, num_places, num_blocks, size).transpose(1, 2).reshape(-1, num_places, size)
    y_BPK = torch.bmm(x_BPK, blocks_GNKK.view(-1, size, size))
    return y_BPK.view(num_runs, num_blocks, num_places, size).transpose(1, 2).reshape(x_GPD.shape)


def mixed_in_pairs(y_ND: Tensor, own_ND: Tensor, other_ND: Tensor, group: int) -> Tensor:
    """own * y + other * y', y' being y with the two halves of each `group` of features exchanged."""
    exchanged_ND = y_ND.view(len(y_ND), -1, 2, group // 2).flip(2).reshape(y_ND.shape)
    return torch.addcmul(own_ND * y_ND, other_ND, exchanged_ND)
