"""The cheapest primitive for a linear map that a method gives as two factors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peft_serve.adapters.base import SiteSpec
from peft_serve.adapters.primitives import Dense, LowRank


def is_low(rank: int, out_features: int, in_features: int) -> bool:
    """Whether two factors of this rank cost less than their product, in multiplications and in memory alike."""
    return rank * (out_features + in_features) < out_features * in_features


def num_factored(spec: SiteSpec, rank: int) -> int:
    """How many numbers `low_rank_or_dense` makes at a site of two factors of this rank."""
    return min(rank * (spec.out_features + spec.in_features), num_dense(spec))


def num_dense(spec: SiteSpec) -> int:
    """The entries of a matrix of the site's shape."""
    return spec.out_features * spec.in_features


def served_rank(spec: SiteSpec, rank: int) -> int:
    """The rank of what `low_rank_or_dense` makes at a site: 0 where it makes a matrix."""
    return rank if is_low(rank, spec.out_features, spec.in_features) else 0


def low_rank_or_dense(a_RI: Tensor, b_OR: Tensor) -> dict[str, Any]:
    """The terms of an `Affine` for x -> B A x: `delta` while that is cheaper than one matrix, else `maps`."""
    if is_low(a_RI.shape[0], b_OR.shape[0], a_RI.shape[1]):
        return {"delta": LowRank(a_RI, b_OR)}
    return {"maps": (Dense(b_OR @ a_RI),)}
