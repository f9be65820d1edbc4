"""The slow truth of the grouped ops: adapter by adapter, formula by formula.

    y = s_out * (W (s_in * x) + b) + B A x + c

`runs` are (slot, number of tokens) in order of the tokens; a slot that a mapping does not name changes nothing.
Nothing is shared between adapters, nothing is done in place, and nothing is fast.

Shapes: `T` tokens, `I` in and `O` out features, `D` either, `V` vocabulary, `r` an adapter's own rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Runs = Sequence[tuple[int, int]]
Factors = Mapping[int, tuple[Tensor, Tensor]]
"""(A [r, I], B [O, r]) by slot."""
Vectors = Mapping[int, Tensor]


def low_rank(y_TO: Tensor, x_TI: Tensor, runs: Runs, factors: Factors) -> Tensor:
    """y + B A x."""

    def of(slot: int, y: Tensor, x: Tensor) -> Tensor:
        if slot not in factors:
            return y
        a, b = factors[slot]
        return y + x @ a.T @ b.T

    return _each(of, y_TO, x_TI, runs)


def low_rank_lookup(y_TO: Tensor, ids_T: Tensor, runs: Runs, factors: Factors) -> Tensor:
    """y + B A[:, ids]."""

    def of(slot: int, y: Tensor, ids: Tensor) -> Tensor:
        if slot not in factors:
            return y
        a, b = factors[slot]
        return y + a.T[ids] @ b.T

    return _each(of, y_TO, ids_T, runs)


def scale(x_TD: Tensor, runs: Runs, vectors: Vectors) -> Tensor:
    """s * x."""
    return _each(lambda slot, y, _: y * vectors[slot] if slot in vectors else y, x_TD, x_TD, runs)


def scale_by_id(y_TD: Tensor, ids_T: Tensor, runs: Runs, vectors: Vectors) -> Tensor:
    """s[ids] * y."""
    return _each(lambda slot, y, ids: y * vectors[slot][ids, None] if slot in vectors else y, y_TD, ids_T, runs)


def shift(y_TD: Tensor, runs: Runs, vectors: Vectors) -> Tensor:
    """y + c."""
    return _each(lambda slot, y, _: y + vectors[slot] if slot in vectors else y, y_TD, y_TD, runs)


def _each(of: Callable[[int, Tensor, Tensor], Tensor], y: Tensor, x: Tensor, runs: Runs) -> Tensor:
    assert sum(num_tokens for _, num_tokens in runs) == len(y) == len(x), "runs cover the tokens"
    done, at = [], 0
    for slot, num_tokens in runs:
        done.append(of(slot, y[at : at + num_tokens], x[at : at + num_tokens]))
        at += num_tokens
    return torch.cat(done)
