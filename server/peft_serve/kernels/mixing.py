"""Mixers of features, many adapters in one call. Pure functions of tensors, none of them in place.

Shapes: `G` runs of one length, `P` tokens of each, `n` blocks of size `k`, `D` = n k features, `N` tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
