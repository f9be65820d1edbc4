"""The normal form as plain matrices in float64, one adapter at a time; and random edits of every kind of term."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.primitives import (
    Affine,
    BlockDiagonal,
    Dense,
    Edit,
    Kronecker,
    LinearMap,
    LowRank,
    Mixer,
    Paired,
    Replace,
    Rows,
    Sparse,
)
from peft_serve.adapters.shared_primitives import Rescaled, SharedBases
from peft_serve.adapters.transform_primitives import Circulant, Spectrum


def expected(spec: SiteSpec, weight: Tensor, bias: Tensor | None, edit: Edit | None, x_T: Tensor) -> Tensor:
    """What one adapter's tokens get. `weight` is [out, in], of an embedding too, where x holds ids."""
    weight, bias = weight.double(), None if bias is None else bias.double()
    x_TI = one_hot(x_T, spec.in_features) if spec.kind is SiteKind.EMBEDDING else x_T.double()
    if isinstance(edit, Replace):
        own = edit.state.get("weight")
        is_turned = spec.kind in (SiteKind.CONV1D, SiteKind.EMBEDDING)
        weight = weight if own is None else (own.T if is_turned else own).double()
        bias = edit.state["bias"].double() if "bias" in edit.state else bias
        return spec.embed_scale * (x_TI @ weight.T) + (0 if bias is None else bias)
    affine = edit if isinstance(edit, Affine) else Affine()
    weight = spec.embed_scale * with_rows(weight, affine.rows, is_lookup=spec.kind is SiteKind.EMBEDDING)
    z = x_TI if affine.in_scale is None else affine.in_scale.double() * x_TI
    z = z if affine.in_mix is None else z @ mixing_matrix(affine.in_mix, spec.in_features)
    y = z @ weight.T + (0 if bias is None else bias)
    y = y if affine.out_scale is None else affine.out_scale.double() * y
    y = y if affine.out_mix is None else y @ mixing_matrix(affine.out_mix, spec.out_features)
    if affine.delta is not None:
        y = y + x_TI @ (affine.delta.b_OR.double() @ affine.delta.a_RI.double()).T
    for one in affine.maps:
        y = y + x_TI @ map_matrix(one, spec).T
    return y if affine.shift is None else y + affine.shift.double()


def one_hot(ids_T: Tensor, size: int) -> Tensor:
    return torch.nn.functional.one_hot(ids_T, size).double()


def with_rows(weight_OI: Tensor, rows: Rows | None, *, is_lookup: bool) -> Tensor:
    own = weight_OI.clone()
    for at, values in zip(*([], []) if rows is None else (rows.ids_N.tolist(), rows.values_ND.double()), strict=True):
        if is_lookup:
            own[:, at] = values
        else:
            own[at] = values
    return own


def mixing_matrix(mixer: Mixer, size: int) -> Tensor:
    """[size, size], to be multiplied from the right."""
    if isinstance(mixer, BlockDiagonal):
        return torch.block_diag(*mixer.blocks_NKK.double())
    matrix, half = torch.diag(mixer.own_O.double()), mixer.group // 2
    for feature in range(size):
        partner = feature + half if feature % mixer.group < half else feature - half
        matrix[partner, feature] += mixer.other_O[feature].double()
    return matrix


def map_matrix(one: LinearMap, spec: SiteSpec) -> Tensor:
    """[out, in]"""
    if isinstance(one, Dense):
        return one.weight_OI.double()
    if isinstance(one, Kronecker):
        return torch.kron(one.left.double().contiguous(), one.right.double().contiguous())
    if isinstance(one, Sparse):
        matrix = torch.zeros(spec.out_features, spec.in_features, dtype=torch.float64)
        for row, column, value in zip(one.out_N.tolist(), one.in_N.tolist(), one.values_N.double(), strict=True):
            matrix[row, column] += value
        return matrix
    if isinstance(one, Circulant):
        side = one.kernel_MNB.shape[2]
        turns = (torch.arange(side)[None, :] - torch.arange(side)[:, None]) % side
        blocks = [torch.cat([kernel[turns] for kernel in row.double()], dim=1) for row in one.kernel_MNB]
        return torch.cat(blocks)
    if isinstance(one, Spectrum):
        spectrum = map_matrix(Sparse(one.out_N, one.in_N, one.values_N), spec)
        return torch.fft.ifft2(spectrum).real
    if isinstance(one, SharedBases):
        return _bases_matrix(one, spec)
    a = one.a_RI[:, : spec.in_features].double()
    b = one.b_OR[: spec.out_features].double()
    return one.outer_O.double()[:, None] * (b @ (one.inner_R.double()[:, None] * a))


def _bases_matrix(one: SharedBases, spec: SiteSpec) -> Tensor:
    small, large = sorted((spec.out_features, spec.in_features))
    a, gains = one.a_RS[:, :small].double(), one.gains_QS.double()
    rows = torch.stack([w * a[p] * gains[q] for p, each in enumerate(one.weights_RQ) for q, w in enumerate(each)])
    matrix = one.b_LC[:large, : len(rows)].double() @ rows
    return matrix.T if one.is_transposed else matrix


# --- random edits -----------------------------------------------------------------------------------------

LINEAR_TERMS = (
    "delta",
    "in_scale",
    "out_scale",
    "shift",
    "in_blocks",
    "out_blocks",
    "out_pairs",
    "rescaled",
    "bases",
    "dense",
    "kronecker",
    "sparse",
    "circulant",
    "spectrum",
    "rows",
    "replace",
)
LOOKUP_TERMS = tuple(t for t in LINEAR_TERMS if t not in ("in_blocks", "bases", "circulant", "spectrum"))


class Dice:
    """Random tensors from one seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 0.3) -> Tensor:
        return scale * torch.randn(shape, generator=self._generator)

    def gain(self, size: int) -> Tensor:
        return 1 + self.normal(size)

    def below(self, bound: int, *shape: int) -> Tensor:
        return torch.randint(0, bound, shape, generator=self._generator)

    def some(self, bound: int, count: int) -> Tensor:
        """Distinct, in no order."""
        return torch.randperm(bound, generator=self._generator)[:count]


def edit_of(term: str, spec: SiteSpec, seed: int) -> Edit:
    """One term, or all that go together ("all"); the seed decides sizes too."""
    dice = Dice(seed)
    if term == "replace":
        return Replace({name: dice.normal(*shape) for name, shape in spec.parameters.items()})
    if term != "all":
        return Affine(**_part(term, spec, dice, seed))  # type: ignore[arg-type]
    parts: dict[str, object] = {}
    terms = LOOKUP_TERMS if spec.kind is SiteKind.EMBEDDING else LINEAR_TERMS
    maps: list[object] = []
    for name in terms:
        if name == "replace" or name == ("out_pairs" if seed % 2 else "out_blocks"):
            continue
        part = _part(name, spec, dice, seed)
        maps.extend(part.pop("maps", ()))  # type: ignore[call-overload]
        parts.update(part)
    return Affine(**parts, maps=tuple(maps))  # type: ignore[arg-type]


def _part(term: str, spec: SiteSpec, dice: Dice, seed: int) -> dict[str, object]:
    num_in, num_out = spec.in_features, spec.out_features
    if term == "delta":
        rank = 1 + seed % 5
        return {"delta": LowRank(dice.normal(rank, num_in), dice.normal(num_out, rank))}
    if term in ("in_scale", "out_scale"):
        return {term: dice.gain(num_in if term == "in_scale" else num_out)}
    if term == "shift":
        return {"shift": dice.normal(num_out)}
    if term in ("in_blocks", "out_blocks"):
        field, size = ("in_mix", num_in) if term == "in_blocks" else ("out_mix", num_out)
        side = (2, 4)[seed % 2]
        return {field: BlockDiagonal(dice.normal(size // side, side, side))}
    if term == "out_pairs":
        return {"out_mix": Paired(dice.gain(num_out), dice.normal(num_out), group=(2, 4)[seed % 2])}
    if term == "rows":
        is_lookup = spec.kind is SiteKind.EMBEDDING
        ids = dice.some(num_in if is_lookup else num_out, 3 + seed % 4)
        return {"rows": Rows(ids, dice.normal(len(ids), num_out if is_lookup else num_in))}
    return {"maps": (_map(term, spec, dice, seed),)}


def _map(term: str, spec: SiteSpec, dice: Dice, seed: int) -> LinearMap:
    num_in, num_out = spec.in_features, spec.out_features
    if term == "dense":
        return Dense(dice.normal(num_out, num_in))
    if term == "kronecker":
        p, q = ((2, 4), (4, 2))[seed % 2]
        return Kronecker(dice.normal(p, q), dice.normal(num_out // p, num_in // q))
    if term in ("sparse", "spectrum"):
        count = 7 * (seed % 4)  # none at all, too; and some of them at one place
        values = dice.normal(count, scale=0.3 if term == "sparse" else 10.0)
        return (Sparse if term == "sparse" else Spectrum)(dice.below(num_out, count), dice.below(num_in, count), values)
    if term == "circulant":
        side = (1, 2, 4)[seed % 3]
        return Circulant(dice.normal(num_out // side, num_in // side, side))
    shared = Dice(seed % 2)  # of two keys, larger than any site
    if term == "bases":
        small = min(num_in, num_out)
        num_ranks, num_gains = 2 + seed % 2, 1 + seed % 3
        a, b = shared.normal(num_ranks, 131), shared.normal(132, 13)
        own = dice.normal(num_ranks, num_gains), dice.normal(num_gains, small, scale=1.0)
        return SharedBases(f"bases {seed % 2}", a, b, *own, is_transposed=num_out < num_in)
    a, b = shared.normal(5 + seed % 2, 131), shared.normal(132, 5 + seed % 2)
    return Rescaled(f"key {seed % 2}", a, b, dice.normal(len(a)), dice.normal(num_out))
