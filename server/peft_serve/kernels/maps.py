"""Linear maps that are neither dense nor plain low-rank. A name that ends in `_` changes y in place, only that.

Shapes: `T` tokens, `I` in and `O` out features, `N` tokens of some adapters or entries of a sparse map, `R` rank.
A Kronecker product's left factor is [p, q], its right one [r, s]: O = p r, I = q s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from peft_serve.kernels.subsets import Tokens


def add_rescaled_(
    y_TO: Tensor,
    x_T: Tensor,
    subset: Tokens,
    a_RI: Tensor,
    b_OR: Tensor,
    inner_NR: Tensor,
    outer_NO: Tensor,
    *,
    is_lookup: bool,
) -> None:
    """y += outer * ((inner * (x A^T)) B^T) for the tokens of a subset, each with vectors of its own (VeRA)."""
    x_N = subset.take(x_T)
    low_NR = a_RI.index_select(1, x_N).t() if is_lookup else x_N @ a_RI.t()
    subset.add_(y_TO, ((low_NR * inner_NR) @ b_OR.t()).mul_(outer_NO))


def add_kronecker_(y_TO: Tensor, x_TI: Tensor, left: Tensor, right: Tensor) -> None:
    """y += (L kron R) x, as L X R^T with x read as the matrix X [q, s]: in the cheaper order of the two products."""
    (p, q), (r, s) = left.shape, right.shape
    x_TQS = x_TI.view(-1, q, s)
    is_right_first = q * s * r + p * q * r <= p * q * s + p * s * r
    y_TPR = left @ (x_TQS @ right.t()) if is_right_first else (left @ x_TQS) @ right.t()
    y_TO.add_(y_TPR.flatten(1))


def add_kronecker_lookup_(y_TO: Tensor, ids_T: Tensor, left: Tensor, right: Tensor) -> None:
    """y += the columns `ids` of L kron R."""
    num_right = right.shape[1]
    left_TP, right_TR = left.t()[ids_T // num_right], right.t()[ids_T % num_right]
    y_TO.add_((left_TP[:, :, None] * right_TR[:, None, :]).flatten(1))


@dataclass(frozen=True, slots=True)
class Compressed:
    """The entries of a sparse matrix, row by row: those of row m are [starts[m], starts[m + 1])."""

    starts_M: Tensor  # one more than there are rows
    column_N: Tensor
    value_N: Tensor


def compressed(row_N: Tensor, column_N: Tensor, value_N: Tensor, *, num_rows: int) -> Compressed:
    """Sort entries by row; several at one place stay several, and add up when they are used."""
    order_N = torch.argsort(row_N, stable=True)
    starts = torch.zeros(num_rows + 1, dtype=torch.int64, device=row_N.device)
    starts[1:] = torch.bincount(row_N, minlength=num_rows).cumsum(0)
    return Compressed(starts, column_N[order_N], value_N[order_N])


def add_sparse_(y_TO: Tensor, x_TI: Tensor, rows: Compressed) -> None:
    """y += S x, `rows` being S by its rows: each output is a weighted bag of inputs (docs/decisions/0005)."""
    if not len(rows.column_N):
        return
    num_tokens = len(x_TI)
    wide_TI = x_TI.expand(2, -1) if num_tokens == 1 else x_TI  # bags of single numbers take a slow path
    bags_OT = embedding_bag(
        rows.column_N,
        wide_TI.t().contiguous(),
        rows.starts_M,
        mode="sum",
        per_sample_weights=rows.value_N,
        include_last_offset=True,
    )
    y_TO.add_(bags_OT.t()[:num_tokens])


def most_in_a_row(rows: Compressed) -> int:
    """How many entries the fullest row has."""
    return int(rows.starts_M.diff().max())


def add_sparse_lookup_(y_TO: Tensor, ids_T: Tensor, columns: Compressed, *, most: int) -> None:
    """y += S[:, ids], `columns` being S by its columns, of which none has more than `most` entries.

    Each token reads as many: what is asked of the device does not depend on its id.
    """
    if not most:
        return
    first_T1, last_T1 = columns.starts_M[ids_T, None], columns.starts_M[ids_T + 1, None]
    entry_TW = first_T1 + torch.arange(most, device=ids_T.device)
    is_own_TW = entry_TW < last_T1
    entry_TW = entry_TW.clamp_(max=len(columns.column_N) - 1)
    value_TW = columns.value_N[entry_TW].masked_fill_(~is_own_TW, 0)
    y_TO.scatter_add_(1, columns.column_N[entry_TW], value_TW)
