"""LoRA and its variants: what they save at a site, and the terms that it amounts to."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from peft_serve.adapters.base import Base, SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.methods import lora_config
from peft_serve.adapters.methods.fields import contradiction
from peft_serve.adapters.methods.lora_bases import change_of_base, joined, work_of_change
from peft_serve.adapters.methods.lora_config import LORA, Variant, rank_at, scale_at, variant
from peft_serve.adapters.methods.lora_experts import (
    check_router,
    experts,
    layout_of_experts,
    parameter_path,
    sites_of_parameters,
    unknown_parameters,
)
from peft_serve.adapters.primitives import Affine, Edit, LowRank
from peft_serve.adapters.registry import DENSE, Shape, SharedLayout, Site, SiteLayout, Stored, compiles
from peft_serve.adapters.targets import Named, named_by_modules, tie_partners
from peft_serve.adapters.token_rows import ROWS, ids_at, input_embedding, rows_edit, shape_of_rows

TOKEN_ROWS: Final = f"token_adapter.{ROWS}"
TOKEN_FIELD: Final = "trainable_token_indices"
LEFTOVERS: Final = ("lora_velora_embed", "lora_monteclora_sampler.")
LINEAR_ONLY: Final = frozenset({Variant.BLOCK_DIAGONAL, Variant.POOLED, Variant.KASA})
EMBEDDING_TOO: Final = frozenset({Variant.PLAIN, Variant.DORA})


# ---- what is stored


def _layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:
    if TOKEN_ROWS in stored:
        # peft wraps a table with trained rows or with LoRA, never with both: anything else here is one too many
        ids = ids_at(config.raw(TOKEN_FIELD), spec.path)
        return SiteLayout(tensors={TOKEN_ROWS: (shape_of_rows(spec, ids, TOKEN_FIELD),)})
    if spec.kind is SiteKind.EXPERTS:
        return layout_of_experts(spec, config)
    if spec.kind is SiteKind.ROUTER:
        check_router(spec, config)
    _check_kind(spec, config)
    rank = rank_at(config, parameter_path(spec, config))
    tensors = _factor_shapes(spec, config, rank, stored) | _extra_shapes(spec, config, rank)
    changes_base = config.raw("init_lora_weights") in lora_config.BASE_CHANGING_INITS
    is_doubled = (changes_base and spec.kind is not SiteKind.EMBEDDING) or variant(config) is Variant.KASA
    return SiteLayout(
        tensors=tensors,
        rank=2 * rank if is_doubled else rank,
        leftovers=LEFTOVERS,
        num_values=2 * rank * (spec.out_features + spec.in_features) if is_doubled else 0,
        work=work_of_change(spec, config),
    )


def _check_kind(spec: SiteSpec, config: Config) -> None:
    wanted = variant(config)
    if spec.kind is SiteKind.EMBEDDING and wanted not in EMBEDDING_TOO:
        raise contradiction(wanted, f"is not defined at {spec.path}, an embedding; leave it out of target_modules")
    if spec.kind is SiteKind.CONV1D and wanted in LINEAR_ONLY:
        raise contradiction(wanted, f"is not defined at {spec.path}, a Conv1D layer; leave it out of target_modules")
    if spec.kind is SiteKind.CONV1D and config.raw("init_lora_weights") == "olora":
        reason = f"is olora, which peft computes from the wrong side of {spec.path}, a Conv1D layer"
        raise contradiction("init_lora_weights", f"{reason}; {lora_config.CONVERT}")
    if config.flag("use_dora") and config.flag("lora_bias"):
        raise contradiction("lora_bias", "is not defined together with use_dora; set one of them to false")


def _factor_shapes(spec: SiteSpec, config: Config, rank: int, stored: Stored) -> dict[str, tuple[Shape, ...]]:
    num_out, num_in = spec.out_features, spec.in_features
    if spec.kind is SiteKind.EMBEDDING:
        return {"lora_embedding_A": ((rank, num_in),), "lora_embedding_B": ((num_out, rank),)}
    a_shape, b_shape = (rank, num_in), (num_out, rank)
    side = lora_config.block_diagonal_side(config, spec.path) if variant(config) is Variant.BLOCK_DIAGONAL else ""
    if side == "a":
        a_shape = (rank, _divided(num_in, rank, config))
    if side == "b":
        b_shape = (num_out, _divided(rank, num_out, config))
    if variant(config) is Variant.POOLED and stored.get("lora_A.weight") != a_shape:
        a_shape = (rank, _pooled(spec, config))
    return {"lora_A.weight": (a_shape,), "lora_B.weight": (b_shape,)}


def _divided(stored: int, other: int, config: Config) -> int:
    count = lora_config.num_blocks(config)
    if stored % count or other % count:
        raise contradiction("use_bdlora", f"has nblocks {count}, which does not divide {stored} and {other}")
    return stored // count


def _pooled(spec: SiteSpec, config: Config) -> int:
    size = config.integer("qalora_group_size", 16)
    if size < 2 or spec.in_features % size:
        raise contradiction("qalora_group_size", f"is {size}; it must divide the inputs of {spec.path}")
    return spec.in_features // size


def _extra_shapes(spec: SiteSpec, config: Config, rank: int) -> dict[str, tuple[Shape, ...]]:
    tensors: dict[str, tuple[Shape, ...]] = {}
    if config.flag("lora_bias") and spec.kind is not SiteKind.EMBEDDING:
        tensors["lora_B.bias"] = ((spec.out_features,),)
    if config.flag("use_dora"):
        tensors["lora_magnitude_vector"] = ((spec.out_features,),)
    if variant(config) is Variant.KASA:
        if rank >= min(spec.out_features, spec.in_features):
            raise contradiction("r", f"is {rank}; KaSA at {spec.path} needs less than the smaller side of its weight")
        tensors["lora_diag"] = ((rank,),)
    return tensors


# ---- what the config says as a whole


def _check(config: Config, base: Base, stored: Stored) -> SharedLayout:
    """LoRA shares no tensors. Raises `AdapterInvalid` for a config that this base cannot follow."""
    unknown = unknown_parameters(config, base)
    if unknown:
        raise contradiction(
            "target_parameters", f"names {unknown[0][:64]!r}, no parameter of a site of the served base"
        )
    return lora_config.check(config, base, stored)


def _named(config: Config, base: Base) -> Named:
    by_modules = named_by_modules(config, base)
    rows, tied_rows = _named_rows(config, base)
    others = rows | sites_of_parameters(config, base)
    if config.raw("target_modules") is None and config.raw("target_parameters"):
        return Named(must=others, may=tied_rows)
    may = None if by_modules.may is None else by_modules.may | tied_rows
    return Named(must=by_modules.must | others, may=may)


def _named_rows(config: Config, base: Base) -> tuple[frozenset[str], frozenset[str]]:
    """Sites that must hold trained rows, and those that may because the rows of a tied one are theirs as well."""
    asked = config.raw(TOKEN_FIELD)
    if not asked:
        return frozenset(), frozenset()
    if not isinstance(asked, dict):
        source = input_embedding(base)
        return frozenset() if source is None else frozenset({source}), frozenset()
    named = [path for path, spec in base.sites.items() if spec.parameters and ids_at(asked, path)]
    follows = {
        path
        for i, path in enumerate(named)
        if any(p in named[:i] and ids_at(asked, p) == ids_at(asked, path) for p in tie_partners(base, path))
    }
    return frozenset(named) - follows, frozenset(follows)


def _fits_any_weight(config: Config) -> bool:
    """Whether B A is the same term whatever weight it was trained on: lengths and changes of a base are not.

    An activated LoRA is the base before its invocation, so that it cannot bring a weight of its own."""
    changes_base = config.raw("init_lora_weights") in lora_config.BASE_CHANGING_INITS
    return variant(config) not in (Variant.DORA, Variant.KASA, Variant.ACTIVATED) and not changes_base


# ---- what it compiles to


@compiles(
    "LORA",
    schema=LORA,
    layout=_layout,
    kinds=DENSE | {SiteKind.EMBEDDING, SiteKind.EXPERTS, SiteKind.ROUTER},
    shared=_check,
    start=lora_config.invocation,
    named=_named,
    fits_any_weight=_fits_any_weight,
)
def lora(site: Site) -> Edit:
    """y = W x + b + s B A x, with s = alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2106.09685, peft `LoraLayer`).

    A variant that changed the base when training began has a second term for that change (`lora_bases`). DoRA
    scales each row of the weight W + s B A to the length m that was learned: with g = m / |W + s B A| the output is
    g (W x) + b + g s B A x, the bias staying as it is (arXiv:2402.09353, peft `DoraLinearLayer`).
    """
    if TOKEN_ROWS in site.tensors:
        return rows_edit(ids_at(site.config.raw(TOKEN_FIELD), site.spec.path), site.tensors[TOKEN_ROWS])
    if site.spec.kind is SiteKind.EXPERTS:
        return experts(site)
    a_RI, b_OR = _factors(site)
    scale = scale_at(site.config, parameter_path(site.spec, site.config), a_RI.shape[0])
    delta = joined(LowRank(a_RI, scale * b_OR), change_of_base(site, a_RI.shape[0], scale))
    if "lora_magnitude_vector" in site.tensors:
        return _with_magnitude(site, delta)
    bias = site.tensors.get("lora_B.bias")
    shift = None if bias is None else scale * bias
    return Affine(delta=LowRank(delta.a_RI, site.spec.embed_scale * delta.b_OR), shift=shift)


def _factors(site: Site) -> tuple[Tensor, Tensor]:
    """A [r, i] and B [o, r] in full, whatever they are stored as."""
    if site.spec.kind is SiteKind.EMBEDDING:
        return site.tensors["lora_embedding_A"], site.tensors["lora_embedding_B"]
    a_RI, b_OR = site.tensors["lora_A.weight"], site.tensors["lora_B.weight"]
    wanted = variant(site.config)
    if wanted is Variant.BLOCK_DIAGONAL:
        return _blocks_expanded(site, a_RI, b_OR)
    if wanted is Variant.POOLED and a_RI.shape[1] != site.spec.in_features:
        return _unpooled(a_RI, site.spec.in_features), b_OR
    if wanted is Variant.KASA:
        return site.tensors["lora_diag"][:, None] * a_RI, b_OR
    return a_RI, b_OR


def _blocks_expanded(site: Site, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
    """BD-LoRA stores the blocks of a block-diagonal factor one above the other (peft `BlockDiagonalLinear`)."""
    side, count = lora_config.block_diagonal_side(site.config, site.spec.path), lora_config.num_blocks(site.config)
    if side == "a":
        a_RI = torch.block_diag(*a_RI.chunk(count))  # type: ignore[no-untyped-call]
    if side == "b":
        b_OR = torch.block_diag(*b_OR.chunk(count))  # type: ignore[no-untyped-call]
    return a_RI, b_OR


def _unpooled(a_RG: Tensor, num_in: int) -> Tensor:
    """QA-LoRA reads the mean of each group of inputs, times the number of groups (arXiv:2309.14717, peft
    `QALoraLinearVariant`)."""
    num_groups = a_RG.shape[1]
    size = num_in // num_groups
    return (a_RG * (num_groups / size)).repeat_interleave(size, dim=1)


def _with_magnitude(site: Site, delta: LowRank) -> Affine:
    # An embedding's output scale comes after the norm: what was learned is the length of the unscaled rows.
    norm_O = _row_norms(site.weight_OI, delta.a_RI, delta.b_OR)
    gain_O = site.tensors["lora_magnitude_vector"] / norm_O
    bias_O = site.bias_O
    return Affine(
        delta=LowRank(delta.a_RI, site.spec.embed_scale * gain_O[:, None] * delta.b_OR),
        out_scale=gain_O,
        shift=None if bias_O is None else (1 - gain_O) * bias_O,
    )


def _row_norms(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, *, rows_at_once: int = 4096) -> Tensor:
    """The norm of each row of W + B A, a block of rows at a time: a vocabulary's worth would not fit."""
    starts = range(0, weight_OI.shape[0], rows_at_once)
    blocks = ((weight_OI[i : i + rows_at_once], b_OR[i : i + rows_at_once]) for i in starts)
    return torch.cat([torch.linalg.vector_norm(weight + b @ a_RI, dim=1) for weight, b in blocks])
