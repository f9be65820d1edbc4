"""What the attention kernel is asked beside its rows: where keys and values lie, and what becomes of scores.

Knows no Triton: who asks need not have it.

Shapes: `H` query and `K` key/value heads, `D` head size, `P` places of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What becomes of the products of queries and keys; what a window hides is a matter of the tables."""

    scaling: float
    softcap: float | None = None
    by_distance_HX: Tensor | None = None  # T5's bias of key - query, from -far to far; contiguous
    slopes_H: Tensor | None = None  # ALiBi's: slope * key position, rounded to the slopes' dtype, / divisor; contiguous
    divisor: float = 1.0
    sinks_H: Tensor | None = None  # contiguous


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Where keys and values lie: [P, K, D] each, of the same strides, place after place in blocks of `block_size`."""

    keys_PKD: Tensor
    values_PKD: Tensor
    block_size: int
