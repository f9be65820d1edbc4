"""Low-rank terms of long runs by torch's grouped products: y[own] += (x[own] A_k^T) B_k, one pair for each rank.

The second way to what `low_rank` does with tiles of many tokens, for what it is measured against on a GPU. Factors of
one rank stand side by side in a copy that lives as long as the step's op; ranks are filled up with zeros to a multiple
of 8, which the alignment of the library asks for. Roundings are those of the tiles: A x to the factors' type, and y.

Shapes: `N` tokens of some adapters, `G` runs, `I` in and `O` out features, `R` rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, pad

from peft_serve.kernels.subsets import Subset, subset_of
from peft_serve.kernels.triton.entries import sent

_GRAIN: Final = 8  # numbers of two bytes that are aligned

Run = tuple[int, int, Tensor, Tensor]
"""Tokens [first, last) of one adapter, with its A [R, I] and B [R, O]."""


@dataclass(frozen=True, slots=True, eq=False)
class RankGroup:
    """The runs whose adapters have one rank, the tokens of each up to `ends_G` among those of the subset."""

    subset: Subset
    ends_G: Tensor
    a_GRI: Tensor
    b_GRO: Tensor


def can_group(num_in: int, num_out: int, dtype: torch.dtype) -> bool:
    """Whether torch has a kernel for such a layer: elsewhere its grouped products read their sizes on the host."""
    return dtype is torch.bfloat16 and num_in % _GRAIN == 0 and num_out % _GRAIN == 0


def rank_groups(runs: Iterable[Run], device: torch.device) -> tuple[RankGroup, ...]:
    """The runs by rank."""
    by_rank: dict[int, list[Run]] = {}
    for run in runs:
        by_rank.setdefault(-(-len(run[2]) // _GRAIN) * _GRAIN, []).append(run)
    return tuple(_group(rank, members, device) for rank, members in by_rank.items())


def _group(rank: int, members: Sequence[Run], device: torch.device) -> RankGroup:
    lengths = torch.tensor([last - first for first, last, _, _ in members], dtype=torch.int32)
    return RankGroup(
        subset_of([(first, last) for first, last, _, _ in members], device),
        sent(lengths.cumsum(0, dtype=torch.int32), device),
        torch.stack([_filled_up(a_RI, rank) for _, _, a_RI, _ in members]),
        torch.stack([_filled_up(b_RO, rank) for _, _, _, b_RO in members]),
    )


def _filled_up(factor_R: Tensor, rank: int) -> Tensor:
    return pad(factor_R, (0, 0, 0, rank - len(factor_R)))


def add_rank_groups_(y_TO: Tensor, x_TI: Tensor, groups: Sequence[RankGroup]) -> None:
    """y += own(x A^T) B. Tokens of no group stay as they are."""
    for group in groups:
        low_NR = grouped_mm(group.subset.take(x_TI), group.a_GRI.transpose(1, 2), offs=group.ends_G)
        group.subset.add_(y_TO, grouped_mm(low_NR, group.b_GRO, offs=group.ends_G))
