"""Methods whose factors are made of a few vectors that all sites share.

The vectors are trained, so no two adapters have the same: each is compiled to low-rank terms of its own, which take
no more than a LoRA of its rank does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import Base, SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.methods.fields import (
    LAYERS,
    RANK,
    TARGETING,
    TARGETS,
    contradiction,
    disagreement,
    tuned_biases,
)
from peft_serve.adapters.methods.forms import low_rank_or_dense, num_factored, served_rank
from peft_serve.adapters.primitives import Affine, LowRank
from peft_serve.adapters.registry import DENSE, Shape, SharedLayout, Site, SiteLayout, Stored, Whole, compiles

SIZE: Final = rules.integer(1, 1 << 32)
MAX_DRAWN: Final = 1 << 27  # numbers that a seed may stand for: the indices of a whole adapter, a GiB of them
MAX_DRAWN_IN_ALL: Final = 1 << 30  # one after another: some seconds' worth


def _check_rank(spec: SiteSpec, r: int) -> None:
    """More ranks than a matrix can have say nothing and could take any amount of memory."""
    if r > min(spec.out_features, spec.in_features):
        raise contradiction("r", f"is {r}; {spec.path} has [{spec.out_features}, {spec.in_features}] and fewer ranks")


# ---- VB-LoRA

LOGITS, INDICES, WEIGHTS = "vblora_logits_", "_topk_indices", "_topk_weights"
VBLORA: Final = ConfigSchema(
    required={
        "r": RANK,
        "num_vectors": SIZE,
        "vector_length": SIZE,
        "topk": rules.integer(1, 256),
        "save_only_topk_weights": rules.flag,
    },
    optional={**TARGETING, "bias": tuned_biases("vblora")},
    inert=frozenset(
        {"vblora_dropout", "fan_in_fan_out", "init_vector_bank_bound", "init_logits_std"}  # of training
    ),
)


def _vblora_shared(config: Config, base: Base, stored: Stored) -> SharedLayout:  # noqa: ARG001 - one signature for every method
    shape = (config.integer("num_vectors"), config.integer("vector_length"))
    return SharedLayout(tensors={"vblora_vector_bank": shape})


def _vblora_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    r, n, length, k = (config.integer(name) for name in ("r", "num_vectors", "vector_length", "topk"))
    o, i = spec.out_features, spec.in_features
    _check_rank(spec, r)
    if o % length or i % length:
        raise contradiction("vector_length", f"is {length}; {spec.path} has [{o}, {i}], which it does not divide")
    if k > n:
        raise contradiction("topk", f"is {k}; there are {n} vectors to choose from")
    places = {"A": (r, i // length), "B": (o // length, r)}
    if not config.flag("save_only_topk_weights"):
        tensors: dict[str, tuple[Shape, ...]] = {f"{LOGITS}{x}": ((*place, n),) for x, place in places.items()}
        return SiteLayout(tensors=tensors, rank=served_rank(spec, r), num_values=num_factored(spec, r))
    indices = {f"{LOGITS}{x}{INDICES}": ((*place, k),) for x, place in places.items()}
    weights = {f"{LOGITS}{x}{WEIGHTS}": ((*place, k - 1),) for x, place in places.items()}
    bounds = dict.fromkeys(indices, n)
    return SiteLayout(
        tensors={**indices, **weights}, indices=bounds, rank=served_rank(spec, r), num_values=num_factored(spec, r)
    )


@compiles("VBLORA", schema=VBLORA, layout=_vblora_layout, shared=_vblora_shared, may_be_empty=True)
def vblora(site: Site) -> Affine:
    """B A x, their pieces mixtures of the k likeliest vectors of a bank (arXiv:2405.15179, peft `VBLoRALayer`).

    A file may hold the logits of all vectors, or which k they were and all but the last of their weights, which
    add up to one.
    """
    a_RTV, b_TRV = (_pieces(site, x) for x in "AB")
    return Affine(**low_rank_or_dense(a_RTV.flatten(start_dim=1), b_TRV.transpose(1, 2).flatten(end_dim=1)))


def _pieces(site: Site, factor: str) -> Tensor:
    logits = site.tensors.get(f"{LOGITS}{factor}")
    if logits is None:
        indices, most = site.tensors[f"{LOGITS}{factor}{INDICES}"], site.tensors[f"{LOGITS}{factor}{WEIGHTS}"]
        weights = torch.cat([most, 1 - most.sum(dim=-1, keepdim=True)], dim=-1)
        if bool((indices.sort(dim=-1).values.diff(dim=-1) == 0).any()):
            raise disagreement(f"{site.spec.path}.{LOGITS}{factor}{INDICES}", "names a vector twice in one place")
    else:
        likeliest, indices = logits.topk(site.config.integer("topk"), dim=-1)
        weights = torch.softmax(likeliest, dim=-1)
    bank_NV = site.shared["vblora_vector_bank"]
    pieces = torch.zeros(*indices.shape[:-1], bank_NV.shape[1])
    for k in range(indices.shape[-1]):  # one at a time: all together take k times the memory of the result
        pieces += weights[..., k, None] * bank_NV[indices[..., k]]
    return pieces


# ---- Uni-LoRA

THETA: Final = "unilora_theta_d"
UNILORA: Final = ConfigSchema(
    required={
        "r": RANK,
        "theta_d_length": SIZE,
        "proj_seed": rules.integer(0, (1 << 64) - 1),
        "save_indices": rules.flag,
    },
    optional={**TARGETS, **LAYERS, "bias": tuned_biases("unilora")},
    inert=frozenset({"unilora_dropout", "fan_in_fan_out", "init_theta_d_bound", "init_weights"}),
)
Factors = tuple[Tensor, Tensor]


def _unilora_shared(config: Config, base: Base, stored: Stored) -> SharedLayout:  # noqa: ARG001 - one signature for every method
    return SharedLayout(tensors={THETA: (config.integer("theta_d_length"),)})


def _factor_shapes(spec: SiteSpec, r: int) -> dict[str, Shape]:
    return {"A": (r, spec.in_features), "B": (spec.out_features, r)}


def _unilora_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    r = config.integer("r")
    _check_rank(spec, r)
    if not config.flag("save_indices"):
        return SiteLayout(tensors={}, rank=served_rank(spec, r), num_values=num_factored(spec, r))
    shapes = _factor_shapes(spec, r)
    tensors = {f"unilora_{what}_{x}": (shape,) for what in ("indices", "scales") for x, shape in shapes.items()}
    bounds = {f"unilora_indices_{x}": config.integer("theta_d_length") for x in shapes}
    return SiteLayout(tensors=tensors, indices=bounds, rank=served_rank(spec, r))


def _unilora_factors(whole: Whole) -> Mapping[str, Factors]:
    """The factors of every site: entries of theta by a balanced shuffle, each over the root of its count."""
    if whole.config.flag("save_indices"):
        return {}
    theta_D, r = whole.shared[THETA], whole.config.integer("r")
    sizes = [r * n for spec in whole.targets for n in (spec.in_features, spec.out_features)]
    if sum(sizes) > MAX_DRAWN:
        raise contradiction("r", f"is {r}: too many indices to draw for {len(whole.targets)} sites; set save_indices")
    indices = _shuffled(sum(sizes), theta_D.shape[0], whole.config.integer("proj_seed"))
    counts_D = torch.bincount(indices, minlength=theta_D.shape[0])
    pieces = torch.split((theta_D * counts_D.clamp(min=1).float().rsqrt())[indices], sizes)
    pairs = zip(whole.targets, pieces[::2], pieces[1::2], strict=True)
    return {s.path: (a.view(r, s.in_features), b.view(s.out_features, r)) for s, a, b in pairs}


def _shuffled(count: int, num_values: int, seed: int) -> Tensor:
    """`count` indices in which each value occurs equally often, or once more (peft `UniLoraModel.generate_index`)."""
    times, remaining = divmod(count, num_values)
    rng = np.random.default_rng(seed)
    indices = np.repeat(np.arange(num_values), times)
    if remaining:
        indices = np.concatenate([indices, rng.choice(num_values, size=remaining, replace=False)])
    rng.shuffle(indices)
    return torch.from_numpy(indices).long()


@compiles(
    "UNILORA",
    schema=UNILORA,
    layout=_unilora_layout,
    shared=_unilora_shared,
    prepare=_unilora_factors,
    has_site_tensors=False,
)
def unilora(site: Site) -> Affine:
    """B A x, every entry of every A and B one of the few of a vector theta (arXiv:2506.00799, peft `UniLoraModel`).

    Which one is drawn from a seed over all sites in the order of the model, or saved.
    """
    if site.prepared:
        return Affine(**low_rank_or_dense(*site.prepared[site.spec.path]))
    theta_D = site.shared[THETA]
    a_RI, b_OR = (theta_D[site.tensors[f"unilora_indices_{x}"]] * site.tensors[f"unilora_scales_{x}"] for x in "AB")
    return Affine(**low_rank_or_dense(a_RI, b_OR))


# ---- TinyLoRA

VECTOR: Final = "tinylora_v."  # and the number of a group of sites
A, B, P = "tinylora_A", "tinylora_B", "tinylora_P"


def _share(value: object) -> str | None:
    fine = type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]
    return None if fine else "a number from 0 to 1"


TINYLORA: Final = ConfigSchema(
    required={
        "r": RANK,
        "u": SIZE,
        "weight_tying": _share,
        "projection_seed": rules.integer(-(1 << 62), 1 << 62),  # the number of a site is added to it
        "save_projection": rules.flag,
    },
    optional={**TARGETS, **LAYERS, "bias": tuned_biases("tinylora")},
    inert=frozenset({"tinylora_dropout", "fan_in_fan_out", "init_v_bound", "init_weights"}),
)


def _tinylora_shared(config: Config, base: Base, stored: Stored) -> SharedLayout:  # noqa: ARG001 - one signature for every method
    """The vectors that are there: how many there must be depends on the sites."""
    names = [name for name in stored if name.startswith(VECTOR)]
    return SharedLayout(tensors=dict.fromkeys(names, (config.integer("u"),)))


def _tinylora_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    o, i, u = spec.out_features, spec.in_features, config.integer("u")
    r = min(config.integer("r"), o, i)
    is_table = spec.kind is SiteKind.EMBEDDING  # A and B are of the table [vocab, d], not of its transpose
    sides = (o, i) if is_table else (i, o)
    tensors: dict[str, tuple[Shape, ...]] = {A: ((r, sides[0]),), B: ((sides[1], r),)}
    if config.flag("save_projection"):
        tensors[P] = ((u, r, r),)
    elif u * r * r > MAX_DRAWN:
        raise contradiction("u", f"is {u}: too many numbers to draw for {r} ranks; set save_projection")
    return SiteLayout(tensors=tensors, rank=r)


def _groups(whole: Whole) -> Mapping[str, tuple[int, str]]:
    """The number of each site in the model's order, and the vector of its group."""
    _check_draws(whole)
    num_sites = len(whole.targets)
    num_groups = max(1, round(num_sites * (1.0 - whole.config.number("weight_tying"))))
    size = max(1, num_sites // num_groups)
    groups = {s.path: (n, f"{VECTOR}{min(n // size, num_groups - 1)}") for n, s in enumerate(whole.targets)}
    wanted = {name for _, name in groups.values()}
    for name in _apart(wanted, whole.shared):
        state = "is missing" if name in wanted else "belongs to no site"
        reason = f"{state}: weight_tying makes {num_groups} groups of {num_sites} sites; upload both files as saved"
        raise disagreement(f"base_model.{name}", reason)
    return groups


def _check_draws(whole: Whole) -> None:
    """Each site has matrices of its own to draw, and no more than one site's at a time are kept."""
    if whole.config.flag("save_projection"):
        return
    r, u = whole.config.integer("r"), whole.config.integer("u")
    num_drawn = sum(u * min(r, spec.out_features, spec.in_features) ** 2 for spec in whole.targets)
    if num_drawn > MAX_DRAWN_IN_ALL:
        raise contradiction(
            "u", f"is {u}: too many numbers to draw for {len(whole.targets)} sites; set save_projection"
        )


def _apart(wanted: set[str], found: Mapping[str, Tensor]) -> Iterator[str]:
    yield from sorted(wanted ^ found.keys())


@compiles(
    "TINYLORA",
    schema=TINYLORA,
    layout=_tinylora_layout,
    kinds=DENSE | {SiteKind.EMBEDDING},
    shared=_tinylora_shared,
    prepare=_groups,
)
def tinylora(site: Site) -> Affine:
    """B (sum_k v_k P_k) A x with random P_k (arXiv:2602.04118, peft `TinyLoraLayer`).

    A and B are singular vectors of the base as it was when training began, and are saved.
    Of an embedding they are the table's, row by row: ids -> A^T R^T B^T[:, ids], which no output scale multiplies.
    """
    number, name = site.prepared[site.spec.path]
    a, b, v_U = site.tensors[A], site.tensors[B], site.shared[name]
    p_URR = site.tensors[P] if P in site.tensors else _drawn(site.config, number, v_U.shape[0], a.shape[0])
    mix_RR = torch.einsum("u,ujk->jk", v_U, p_URR)
    if site.spec.kind is SiteKind.EMBEDDING:
        return Affine(delta=LowRank((b @ mix_RR).T, a.T))
    return Affine(delta=LowRank(a, b @ mix_RR))


def _drawn(config: Config, number: int, u: int, r: int) -> Tensor:
    generator = torch.Generator().manual_seed(config.integer("projection_seed") + number)
    return torch.normal(mean=0.0, std=1.0 / (r**0.5), size=(u, r, r), generator=generator)
