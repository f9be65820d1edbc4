"""What a kernel for gated prompts looks like, o + gate * softmax(q K^T / sqrt(D)) V, whatever computes it.

Shapes: `T` tokens, `Q` query heads, `H` heads of keys and values, `M` learned tokens, `D` head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from peft_serve.kernels.low_rank import Segments

AddGated = Callable[[Tensor, Tensor], object]
"""(o [T, Q, D], q [T, Q, D]) -> o changed in place, for the tokens of adapters that have a prompt alone."""


class Prompts(Protocol):
    """The gated prompts of one attention by slot."""

    def put(self, slot: int, keys_HMD: Tensor, values_HMD: Tensor, gate: Tensor) -> None: ...

    def drop(self, slot: int) -> None: ...

    def op(self, segments: Segments) -> AddGated:
        """For the tokens of a step; those of adapters that have nothing here are passed over."""
        ...


class GatedKernels(Protocol):
    """Who makes them."""

    def serves(self, like: Tensor) -> bool: ...

    def layer(self, num_heads: int, head_dim: int, dtype: torch.dtype) -> Prompts: ...
