"""What a kernel for bottlenecks looks like, y = scale * (U act(D x + b) + c), whatever computes it.

Shapes: `D` features of the model, `B` of a bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from peft_serve.kernels.low_rank import Segments

Lift = Callable[[Tensor], Tensor]
"""x [T, D] -> y [T, D], set for the tokens of adapters that have a bottleneck alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Squeeze:
    """The parameters of one adapter's bottleneck; scale is [D]."""

    down_BD: Tensor
    down_bias_B: Tensor
    up_DB: Tensor
    up_bias_D: Tensor
    scale_D: Tensor


class Squeezes(Protocol):
    """The bottlenecks of one place in the model by slot."""

    def put(self, slot: int, squeeze: Squeeze) -> None: ...

    def drop(self, slot: int) -> None: ...

    def op(self, segments: Segments, activation: str) -> Lift:
        """For tokens of adapters that have a bottleneck here, all with this activation; others are passed over."""
        ...


class BottleneckKernels(Protocol):
    """Who makes them."""

    def serves(self, like: Tensor, activation: str) -> bool: ...

    def layer(self, num_features: int, dtype: torch.dtype) -> Squeezes: ...
