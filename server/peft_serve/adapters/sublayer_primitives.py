"""Primitives of a residual sublayer as a whole, h = f(t) and then N(h + t), and of what enters or leaves layers.

They are what AdapterHub's bottlenecks and ReFT compile to.

They are not linear, so they are no part of a dense site's normal form. Conventions are those of `primitives`.
Shapes: `d` hidden size (`D`), `B` features of a bottleneck, `I` in and `O` out features.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor


class Reads(StrEnum):
    """A stream at a residual sublayer. h: the sublayer's output; t: the residual stream before it."""

    SUBLAYER = "h"
    RESIDUAL = "t"
    SUMMED = "h + t"
    NORMED = "N(h + t)"  # N: the sublayer's norm where the model normalises after adding, else nothing


@dataclass(frozen=True, slots=True)
class LearnedNorm:
    """A layer norm over the d features that an adapter brings along; epsilon 1e-5."""

    weight_D: Tensor
    bias_D: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """A sublayer site: h -> keep + scale * up(act(down(read))), before the residual is added (AdapterHub).

    With `norm_after` the scaled up-projection is normed, together with what is kept if `norms_kept`, else before
    that is added. `is_final`: the result is what the whole sublayer gives; no residual and no norm come after it.
    """

    down_BD: Tensor
    down_bias_B: Tensor
    up_DB: Tensor
    up_bias_D: Tensor
    activation: str  # a key of transformers' ACT2FN, or leakyrelu
    scale: Tensor  # [1] or [d]
    reads: Reads
    keeps: Reads = Reads.SUBLAYER
    norm_before: LearnedNorm | None = None  # of what is read
    norm_after: LearnedNorm | None = None
    norms_kept: bool = False
    is_final: bool = False


@dataclass(frozen=True, slots=True)
class TwoLayers:
    """x -> W2 act(W1 x + b1) + b2."""

    first_BI: Tensor
    first_bias_B: Tensor
    second_OB: Tensor
    second_bias_O: Tensor


@dataclass(frozen=True, slots=True)
class Coupling:
    """What enters the first layer, cut in half: (x1, x2) -> (y1, x2 + G(y1)) with y1 = x1 + F(x2) (AdapterHub)."""

    left: TwoLayers  # F
    right: TwoLayers  # G
    activation: str


@dataclass(frozen=True, slots=True)
class SubspaceEdit:
    """x -> x + P^T (act(W x + b) - P x), or without the last term: a low-rank edit of hidden states."""

    source_RD: Tensor  # W
    source_bias_R: Tensor
    projection_RD: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervention:
    """What leaves a layer, edited at the first and the last positions of the sequence (ReFT, arXiv:2404.03592).

    The sequence is the prompt, or an encoder's row, without virtual tokens; a generated token is one of its own.
    """

    first: SubspaceEdit
    last: SubspaceEdit
    num_first: int
    num_last: int
    activation: str | None  # as a bottleneck's; None: nothing
    subtracts: bool  # P x
