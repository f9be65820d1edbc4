"""Terms: random adapters made of one kind of term (W11)."""

from collections.abc import Callable

import torch
from torch import Tensor

from loadtest.work import is_head
from peft_serve.adapters.base import BaseShape, SiteKind, SiteSpec
from peft_serve.adapters.primitives import (
    Adapter,
    Affine,
    BlockDiagonal,
    Dense,
    Edit,
    GatedPrompt,
    Kronecker,
    LowRank,
    Paired,
    Replace,
    Rows,
    Sparse,
)
from peft_serve.adapters.shared_primitives import Rescaled, SharedBases
from peft_serve.adapters.sublayer_primitives import Bottleneck, Intervention, Reads, SubspaceEdit
from peft_serve.adapters.transform_primitives import Circulant, Spectrum
from peft_serve.core import AdapterId
from peft_serve.model.base import ResidentBase


class Dice:
    """Random tensors, small enough that sixteen layers of them stay finite."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def small(self, *shape: int) -> Tensor:
        return (0.02 * torch.randn(shape, generator=self._generator)).to(self._dtype)

    def gain(self, *shape: int) -> Tensor:
        return (1 + 0.1 * torch.randn(shape, generator=self._generator)).to(self._dtype)

    def places(self, bound: int, count: int) -> Tensor:
        return torch.randint(0, bound, (count,), generator=self._generator)

    def some(self, bound: int, count: int) -> Tensor:
        return torch.randperm(bound, generator=self._generator)[:count]


EditOf = Callable[[SiteSpec, BaseShape, Dice], Edit | None]
"""The term at this site, or None where it has no business."""


def on_linear(make: Callable[[int, int, Dice], Affine]) -> EditOf:
    """A term of every linear layer but the head, from its out and in features."""

    def edit(spec: SiteSpec, shape: BaseShape, dice: Dice) -> Edit | None:
        is_ours = spec.kind is SiteKind.LINEAR and not is_head(spec, shape.vocab_size)
        return make(spec.out_features, spec.in_features, dice) if is_ours else None

    return edit


def _low_rank(rank: int) -> Callable[[int, int, Dice], Affine]:
    return lambda num_out, num_in, dice: Affine(delta=LowRank(dice.small(rank, num_in), dice.small(num_out, rank)))


def _blocks(size: int, dice: Dice) -> BlockDiagonal:
    return BlockDiagonal(torch.eye(32, dtype=dice.small(1).dtype) + dice.small(size // 32, 32, 32))


def _rescaled(num_out: int, num_in: int, dice: Dice) -> Affine:
    shared = Dice(0, dice.small(1).dtype)  # one pair of factors for every adapter of a size
    factors = shared.small(64, num_in), shared.small(num_out, 64)
    return Affine(maps=(Rescaled(f"{num_out} by {num_in}", *factors, dice.gain(64), dice.gain(num_out)),))


def _shared_bases(num_out: int, num_in: int, dice: Dice) -> Affine:
    shared, rank = Dice(0, dice.small(1).dtype), 32
    small, large = sorted((num_out, num_in))
    num_gains = small // rank
    factors = shared.small(rank, small), shared.small(large, rank * num_gains)
    own = dice.small(rank, num_gains), dice.gain(num_gains, small)
    return Affine(maps=(SharedBases(f"{num_out} by {num_in}", *factors, *own, num_out < num_in),))


def _sparse(num_out: int, num_in: int, dice: Dice) -> Affine:
    count = num_out * num_in // 100
    return Affine(maps=(Sparse(dice.places(num_out, count), dice.places(num_in, count), dice.small(count)),))


def _spectrum(num_out: int, num_in: int, dice: Dice) -> Affine:
    return Affine(maps=(Spectrum(dice.places(num_out, 1000), dice.places(num_in, 1000), dice.small(1000)),))


def _norms(spec: SiteSpec, _: BaseShape, dice: Dice) -> Edit | None:
    return Replace({"weight": dice.gain(spec.out_features)}) if spec.kind is SiteKind.NORM else None


def _rows(spec: SiteSpec, shape: BaseShape, dice: Dice) -> Edit | None:
    if shape.vocab_size not in (spec.in_features, spec.out_features):
        return None
    return Affine(rows=Rows(dice.some(shape.vocab_size, 64), dice.small(64, shape.hidden_size)))


def _bottleneck(spec: SiteSpec, _: BaseShape, dice: Dice) -> Edit | None:
    """Of 64 features, behind every feed-forward."""
    if spec.kind is not SiteKind.SUBLAYER or not spec.path.endswith("output_adapters"):
        return None
    size = spec.out_features
    down, up = (dice.small(64, size), dice.small(64)), (dice.small(size, 64), dice.small(size))
    return Bottleneck(
        down_BD=down[0],
        down_bias_B=down[1],
        up_DB=up[0],
        up_bias_D=up[1],
        activation="relu",
        scale=dice.gain(1),
        reads=Reads.SUBLAYER,
    )


def _intervention(spec: SiteSpec, _: BaseShape, dice: Dice) -> Edit | None:
    """Of rank 4, at the first and the last position."""
    if spec.kind is not SiteKind.LAYER:
        return None
    first, last = (
        SubspaceEdit(dice.small(4, spec.out_features), dice.small(4), dice.small(4, spec.out_features))
        for _ in range(2)
    )
    return Intervention(first=first, last=last, num_first=1, num_last=1, activation=None, subtracts=True)


def _gated_prompt(spec: SiteSpec, shape: BaseShape, dice: Dice) -> Edit | None:
    if spec.kind is not SiteKind.ATTENTION:
        return None
    keys, values = (dice.small(shape.num_kv_heads, 10, shape.head_dim) for _ in range(2))
    return GatedPrompt(keys, values, dice.gain(1), is_projected=True)


TERMS: dict[str, EditOf] = {
    **{f"low rank {rank}": on_linear(_low_rank(rank)) for rank in (8, 16, 64)},
    "input scale": on_linear(lambda _, i, d: Affine(in_scale=d.gain(i))),
    "output scale and shift": on_linear(lambda o, _, d: Affine(out_scale=d.gain(o), shift=d.small(o))),
    "input blocks of 32": on_linear(lambda _, i, d: Affine(in_mix=_blocks(i, d))),
    "output blocks of 32": on_linear(lambda o, _, d: Affine(out_mix=_blocks(o, d))),
    "pairs": on_linear(lambda o, _, d: Affine(out_mix=Paired(d.gain(o), d.small(o), 64))),
    "rescaled, rank 64": on_linear(_rescaled),
    "Kronecker, 8 by 8": on_linear(lambda o, i, d: Affine(maps=(Kronecker(d.small(8, 8), d.small(o // 8, i // 8)),))),
    "shared bases, rank 32": on_linear(_shared_bases),
    "sparse, 1 %": on_linear(_sparse),
    "circulant blocks of 64": on_linear(lambda o, i, d: Affine(maps=(Circulant(d.small(o // 64, i // 64, 64)),))),
    "spectrum of 1000": on_linear(_spectrum),
    "dense": on_linear(lambda o, i, d: Affine(maps=(Dense(d.small(o, i)),))),
    "64 rows of the vocabulary": _rows,
    "own norms": _norms,
    "gated prompt of 10": _gated_prompt,
    "bottleneck of 64": _bottleneck,
    "intervention of rank 4": _intervention,
}


def make_adapter(base: ResidentBase, edit_of: EditOf, seed: int) -> Adapter:
    """A random adapter of one term, at every site that takes it."""
    dice = Dice(seed, base.dtype)
    edits = ((path, edit_of(spec, base.shape, dice)) for path, spec in base.sites.items())
    sites = {path: edit for path, edit in edits if edit is not None}
    return Adapter(id=AdapterId(f"sha256:{seed}"), method="TEST", sites=sites)
