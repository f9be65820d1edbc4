"""What is looked at before an edit reaches a site: its kind, the shapes of its tensors, the range of its indices.

The compiler has made the edit and the gate has seen the files; this is the last line, where a mistake would cost
the whole batch. It knows sites by their `SiteSpec` only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Final

from torch import Tensor

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.primitives import (
    Affine,
    BlockDiagonal,
    Dense,
    Edit,
    Experts,
    GatedPrompt,
    Kronecker,
    LinearMap,
    Mixer,
    Replace,
    Rows,
    Sparse,
)
from peft_serve.adapters.shared_primitives import SharedBases
from peft_serve.adapters.sublayer_primitives import Bottleneck, Coupling, Intervention
from peft_serve.adapters.transform_primitives import Circulant, Spectrum

Shape = tuple[int, ...]
Wanted = Iterator[tuple[str, Tensor, Shape]]
"""(name, tensor, the shape it must have)"""

_DENSE: Final = frozenset({SiteKind.LINEAR, SiteKind.CONV1D, SiteKind.EMBEDDING})
_OF_FEATURES: Final = (SharedBases, Circulant, Spectrum)


def check_edit(spec: SiteSpec, edit: Edit) -> None:
    """Raise ValueError, naming site, term and rule, for an edit that this site cannot take."""
    for type_, kinds, check in _CHECKS:
        if isinstance(edit, type_) and spec.kind in kinds:
            check(spec, edit)
            return
    raise ValueError(f"site '{spec.path}' is {_A[spec.kind]}, which is no place for {type(edit).__name__}")


def _affine(spec: SiteSpec, edit: Affine) -> None:
    if spec.kind is SiteKind.EMBEDDING and any(isinstance(one, _OF_FEATURES) for one in edit.maps):
        raise ValueError(f"{spec.path}.maps: an embedding's input is ids, which are neither weighed nor transformed")
    _require_shapes(spec, _affine_shapes(spec, edit))
    if edit.in_mix is not None and spec.kind is SiteKind.EMBEDDING:
        raise ValueError(f"{spec.path}.in_mix: an embedding's input is ids, which cannot be mixed; mix its output")
    if edit.rows is not None:
        _check_rows(spec, edit.rows)
    for one in edit.maps:
        if isinstance(one, Sparse | Spectrum):
            _require_range(spec, "maps.out", one.out_N, spec.out_features)
            _require_range(spec, "maps.in", one.in_N, spec.in_features)


def _router(spec: SiteSpec, edit: Affine) -> None:
    """Its weight takes part in a choice, so that no term but a low-rank one of the weight stands beside it."""
    others = [field.name for field in fields(edit) if getattr(edit, field.name) is not field.default]
    if others != ["delta"]:
        raise ValueError(f"site '{spec.path}' is a router, which takes a delta alone and not {', '.join(others)}")
    _require_shapes(spec, _affine_shapes(spec, edit))


def _affine_shapes(spec: SiteSpec, edit: Affine) -> Wanted:
    num_in, num_out = spec.in_features, spec.out_features
    for name, vector, size in (
        ("in_scale", edit.in_scale, num_in),
        ("out_scale", edit.out_scale, num_out),
        ("shift", edit.shift, num_out),
    ):
        if vector is not None:
            yield name, vector, (size,)
    if edit.delta is not None:
        yield "delta.a", edit.delta.a_RI, (edit.delta.rank, num_in)
        yield "delta.b", edit.delta.b_OR, (num_out, edit.delta.rank)
    if edit.in_mix is not None:
        yield from _mixer_shapes(spec, "in_mix", edit.in_mix, num_in)
    if edit.out_mix is not None:
        yield from _mixer_shapes(spec, "out_mix", edit.out_mix, num_out)
    for one in edit.maps:
        yield from _map_shapes(spec, one)


def _mixer_shapes(spec: SiteSpec, name: str, mixer: Mixer, size: int) -> Wanted:
    if isinstance(mixer, BlockDiagonal):
        side = mixer.blocks_NKK.shape[-1]
        if size % max(side, 1):
            raise ValueError(f"{spec.path}.{name} has blocks of {side}, which do not divide {size} features")
        yield name, mixer.blocks_NKK, (size // max(side, 1), side, side)
        return
    yield f"{name}.own", mixer.own_O, (size,)
    yield f"{name}.other", mixer.other_O, (size,)
    if mixer.group < 2 or mixer.group % 2 or size % mixer.group:
        raise ValueError(f"{spec.path}.{name} pairs features in groups of {mixer.group}, which do not divide {size}")


def _map_shapes(spec: SiteSpec, one: LinearMap) -> Wanted:
    num_in, num_out = spec.in_features, spec.out_features
    if isinstance(one, Dense):
        yield "maps.weight", one.weight_OI, (num_out, num_in)
    elif isinstance(one, Sparse | Spectrum):
        for name, tensor in (("out", one.out_N), ("in", one.in_N), ("values", one.values_N)):
            yield f"maps.{name}", tensor, (one.values_N.numel(),)
    elif isinstance(one, Kronecker):
        (p, q), (r, s) = _matrix(spec, "maps.left", one.left), _matrix(spec, "maps.right", one.right)
        if (p * r, q * s) != (num_out, num_in):
            raise ValueError(
                f"{spec.path}.maps: [{p}, {q}] kron [{r}, {s}] is [{p * r}, {q * s}]; the site's is "
                f"[{num_out}, {num_in}]"
            )
    elif isinstance(one, Circulant):
        side = max(one.kernel_MNB.shape[-1], 1)
        if num_out % side or num_in % side:
            raise ValueError(f"{spec.path}.maps has circulants of {side}, which do not divide [{num_out}, {num_in}]")
        yield "maps.kernel", one.kernel_MNB, (num_out // side, num_in // side, side)
    elif isinstance(one, SharedBases):
        yield from _bases_shapes(spec, one)
    else:
        rank = one.inner_R.numel()
        yield "maps.inner", one.inner_R, (rank,)
        yield "maps.outer", one.outer_O, (num_out,)
        yield "maps.a", one.a_RI, (rank, max(num_in, one.a_RI.shape[-1]))
        yield "maps.b", one.b_OR, (max(num_out, one.b_OR.shape[0]), rank)


def _bases_shapes(spec: SiteSpec, one: SharedBases) -> Wanted:
    small, large = spec.in_features, spec.out_features
    if one.is_transposed:
        small, large = large, small
    num_ranks, num_gains = _matrix(spec, "maps.weights", one.weights_RQ)
    wide_a, (long_b, wide_b) = _matrix(spec, "maps.a", one.a_RS)[1], _matrix(spec, "maps.b", one.b_LC)
    yield "maps.gains", one.gains_QS, (num_gains, small)
    yield "maps.a", one.a_RS, (num_ranks, max(small, wide_a))
    yield "maps.b", one.b_LC, (max(large, long_b), max(num_ranks * num_gains, wide_b))


def _check_rows(spec: SiteSpec, rows: Rows) -> None:
    num_rows, width = spec.out_features, spec.in_features
    if spec.kind is SiteKind.EMBEDDING:
        num_rows, width = width, num_rows
    num_ids = rows.ids_N.numel()
    _require_shapes(
        spec, iter([("rows.ids", rows.ids_N, (num_ids,)), ("rows.values", rows.values_ND, (num_ids, width))])
    )
    _require_range(spec, "rows.ids", rows.ids_N, num_rows)
    if len(set(rows.ids_N.tolist())) < num_ids:
        raise ValueError(f"{spec.path}.rows.ids names a row twice; each row has one value")


def _replace(spec: SiteSpec, edit: Replace) -> None:
    _require_shapes(spec, ((name, tensor, spec.parameters.get(name, ())) for name, tensor in edit.state.items()))


def _experts(spec: SiteSpec, edit: Experts) -> None:
    for name, factors in edit.factors.items():
        shape = spec.parameters.get(name, ())
        if len(shape) != 3:
            raise ValueError(f"{spec.path} has no stack of expert matrices '{name}'")
        num_experts, num_out, num_in = shape
        if spec.is_transposed:
            num_out, num_in = num_in, num_out
        rank = factors.a_ERI.shape[1] if factors.a_ERI.ndim == 3 else 0
        wanted = [
            (f"{name}.a", factors.a_ERI, (num_experts, rank, num_in)),
            (f"{name}.b", factors.b_EOR, (num_experts, num_out, rank)),
        ]
        _require_shapes(spec, iter(wanted))


def _gated_prompt(spec: SiteSpec, edit: GatedPrompt) -> None:
    keys = tuple(edit.keys_HPD.shape)
    if len(keys) != 3:
        raise ValueError(f"{spec.path}.keys has shape {list(keys)}; it must be [heads, tokens, head size]")
    _require_shapes(spec, iter([("values", edit.values_HPD, keys), ("gate", edit.gate, (1,))]))


def _bottleneck(spec: SiteSpec, edit: Bottleneck) -> None:
    size, width = spec.out_features, edit.down_BD.shape[0]
    wanted = [
        ("down", edit.down_BD, (width, size)),
        ("down_bias", edit.down_bias_B, (width,)),
        ("up", edit.up_DB, (size, width)),
        ("up_bias", edit.up_bias_D, (size,)),
        ("scale", edit.scale, (1,) if edit.scale.numel() == 1 else (size,)),
    ]
    for name, norm in (("norm_before", edit.norm_before), ("norm_after", edit.norm_after)):
        if norm is not None:
            wanted += [(f"{name}.weight", norm.weight_D, (size,)), (f"{name}.bias", norm.bias_D, (size,))]
    _require_shapes(spec, iter(wanted))


def _coupling(spec: SiteSpec, edit: Coupling) -> None:
    num_left = spec.out_features // 2
    num_right = spec.out_features - num_left
    sides = (("left", edit.left, num_right, num_left), ("right", edit.right, num_left, num_right))
    for name, net, num_in, num_out in sides:
        width = net.first_BI.shape[0]
        wanted = [
            (f"{name}.first", net.first_BI, (width, num_in)),
            (f"{name}.first_bias", net.first_bias_B, (width,)),
            (f"{name}.second", net.second_OB, (num_out, width)),
            (f"{name}.second_bias", net.second_bias_O, (num_out,)),
        ]
        _require_shapes(spec, iter(wanted))


def _intervention(spec: SiteSpec, edit: Intervention) -> None:
    for name, unit in (("first", edit.first), ("last", edit.last)):
        rank = unit.source_bias_R.numel()
        wanted = [
            (f"{name}.source", unit.source_RD, (rank, spec.out_features)),
            (f"{name}.source_bias", unit.source_bias_R, (rank,)),
            (f"{name}.projection", unit.projection_RD, (rank, spec.out_features)),
        ]
        _require_shapes(spec, iter(wanted))
    if edit.num_first < 0 or edit.num_last < 0:
        raise ValueError(f"{spec.path} counts {edit.num_first} first and {edit.num_last} last positions; 0 or more")


def _matrix(spec: SiteSpec, name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.ndim != 2:
        raise ValueError(f"{spec.path}.{name} has shape {list(tensor.shape)}; it must be a matrix")
    return tensor.shape[0], tensor.shape[1]


def _require_shapes(spec: SiteSpec, wanted: Wanted) -> None:
    for name, tensor, shape in wanted:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{spec.path}.{name} has shape {list(tensor.shape)}; the site's is {list(shape)}")


def _require_range(spec: SiteSpec, name: str, ids_N: Tensor, bound: int) -> None:
    if ids_N.is_floating_point():
        raise ValueError(f"{spec.path}.{name} holds {ids_N.dtype}; it must hold whole numbers")
    if ids_N.numel() and not 0 <= int(ids_N.min()) <= int(ids_N.max()) < bound:
        raise ValueError(
            f"{spec.path}.{name} reaches from {int(ids_N.min())} to {int(ids_N.max())}; the site has {bound}"
        )


_CHECKS: Final[tuple[tuple[type, frozenset[SiteKind], Callable[..., None]], ...]] = (
    (Affine, _DENSE, _affine),
    (Replace, _DENSE | {SiteKind.NORM}, _replace),
    (Affine, frozenset({SiteKind.ROUTER}), _router),
    (Experts, frozenset({SiteKind.EXPERTS}), _experts),
    (GatedPrompt, frozenset({SiteKind.ATTENTION}), _gated_prompt),
    (Bottleneck, frozenset({SiteKind.SUBLAYER}), _bottleneck),
    (Coupling, frozenset({SiteKind.SUBLAYER}), _coupling),
    (Intervention, frozenset({SiteKind.LAYER}), _intervention),
)

_A: Final[Mapping[SiteKind, str]] = MappingProxyType(
    {
        SiteKind.LINEAR: "a linear layer",
        SiteKind.CONV1D: "a linear layer",
        SiteKind.EMBEDDING: "an embedding",
        SiteKind.NORM: "a norm",
        SiteKind.EXPERTS: "a stack of experts",
        SiteKind.ROUTER: "a router",
        SiteKind.ATTENTION: "an attention",
        SiteKind.SUBLAYER: "a sublayer",
        SiteKind.LAYER: "a layer",
    }
)
