"""Grouped adapter ops: one call for the tokens of many adapters.

    u[t] = A[r] . x[t]  for the stack rows r of t's own adapter, 0 for every other row      shrink, keep_own_
    y[t] += sum_r u[t, r] B[r]                                                                expand_
    x[t] * table[s(t)],  y[t] += table[s(t)]                                                  *_by_token

Pure functions of tensors; a name that ends in `_` changes its first argument in place, and only that one.
Invariants: the tokens of one adapter are contiguous; a stack holds finite values only, so that a row of
somebody else's B meets an exact zero of u and adds an exact zero. Foreign entries of u are overwritten, never
multiplied: an adapter that overflows on a neighbour's token leaves no trace in the neighbour's result.

Shapes: `T` tokens, `I` in and `O` out features, `D` either of them, `V` vocabulary, `R` rows of a stack (one
for each rank of each adapter in it), `S` slots. Tensors of one call share device and dtype; ids and slots
are int64, masks bool. `reference` has the same semantics, adapter by adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Piece = tuple[int, int, int, int]
"""One adapter's part of a step: tokens [first, last), stack rows [first, last)."""

Part = tuple[int, int, Tensor, Tensor]
"""The same with the rows themselves: tokens [first, last), A [r, I], B [r, O]."""

STREAMED_TOKENS = 4
"""A product with fewer tokens costs what reading its rows costs, which is as much as so many tokens do."""

_PAIR_COST = 270_000
"""What the calls of one pair of products cost, about 8 us, in multiply-adds of one CPU thread."""


def cost_masked(num_tokens: int, num_rows: int, features: int) -> int:
    """Multiply-adds of one masked pair of products over `num_rows` stack rows; `features` is in + out of the site."""
    return num_rows * max(num_tokens, STREAMED_TOKENS) * features + _PAIR_COST


def cost_runs(pieces: Sequence[Piece], features: int) -> int:
    """The same of one pair of products for each adapter."""
    return sum(
        (last_row - first_row) * max(last - first, STREAMED_TOKENS) * features + _PAIR_COST
        for first, last, first_row, last_row in pieces
    )


def shrink(x_TI: Tensor, a_RI: Tensor) -> Tensor:
    """u_TR = x A^T."""
    return torch.mm(x_TI, a_RI.t())


def shrink_ids(ids_T: Tensor, a_RV: Tensor) -> Tensor:
    """u_TR = A[:, ids]^T: `shrink` of one-hot rows, as an embedding sees its tokens."""
    return a_RV.index_select(1, ids_T).t()


def keep_own_(u_TR: Tensor, foreign_TR: Tensor) -> Tensor:
    """Zero the entries of other adapters. `foreign_TR` is true where row r is not of t's adapter."""
    return u_TR.masked_fill_(foreign_TR, 0)


def expand_(y_TO: Tensor, u_TR: Tensor, b_RO: Tensor) -> Tensor:
    """y += u B."""
    return y_TO.addmm_(u_TR, b_RO)


def add_low_rank_(y_TO: Tensor, x_TI: Tensor, a_RI: Tensor, b_RO: Tensor, foreign_TR: Tensor) -> Tensor:
    """y += own(x A^T) B, all adapters in two GEMMs."""
    return expand_(y_TO, keep_own_(shrink(x_TI, a_RI), foreign_TR), b_RO)


def parts_of(a_RI: Tensor, b_RO: Tensor, pieces: Sequence[Piece]) -> tuple[Part, ...]:
    """Views of each adapter's own rows. The rows of `pieces` count from row 0 of a and b."""
    return tuple((first, last, a_RI[low:high], b_RO[low:high]) for first, last, low, high in pieces)


def add_low_rank_runs_(y_TO: Tensor, x_TI: Tensor, parts: Sequence[Part]) -> Tensor:
    """The same, two GEMMs for each adapter."""
    for first, last, a_RI, b_RO in parts:
        expand_(y_TO[first:last], shrink(x_TI[first:last], a_RI), b_RO)
    return y_TO


def add_low_rank_lookup_(y_TO: Tensor, ids_T: Tensor, a_RV: Tensor, b_RO: Tensor, foreign_TR: Tensor) -> Tensor:
    """y += own(A[:, ids]^T) B, all adapters at once."""
    return expand_(y_TO, shrink_ids(ids_T, a_RV).masked_fill(foreign_TR, 0), b_RO)


def add_low_rank_lookup_runs_(y_TO: Tensor, ids_T: Tensor, parts: Sequence[Part]) -> Tensor:
    """The same, adapter by adapter."""
    for first, last, a_RV, b_RO in parts:
        expand_(y_TO[first:last], shrink_ids(ids_T[first:last], a_RV), b_RO)
    return y_TO


def scaled_by_token(x_TD: Tensor, table_SD: Tensor, slot_T: Tensor) -> Tensor:
    """x * table[slot]; row s of the table belongs to slot s, and is ones where slot s scales nothing."""
    return x_TD * table_SD.index_select(0, slot_T)


def scale_by_token_(y_TD: Tensor, table_SD: Tensor, slot_T: Tensor) -> Tensor:
    """y *= table[slot]."""
    return y_TD.mul_(table_SD.index_select(0, slot_T))


def scale_by_id_(y_TD: Tensor, table_SV: Tensor, slot_T: Tensor, ids_T: Tensor) -> Tensor:
    """y *= table[slot, id]: an input scale where the input is a one-hot row."""
    return y_TD.mul_(table_SV[slot_T, ids_T].unsqueeze(1))


def add_by_token_(y_TD: Tensor, table_SD: Tensor, slot_T: Tensor) -> Tensor:
    """y += table[slot]; row s is zeros where slot s adds nothing."""
    return y_TD.add_(table_SD.index_select(0, slot_T))
