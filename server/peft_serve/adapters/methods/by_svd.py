"""Methods that act between the singular vectors of the base's own weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.methods import work
from peft_serve.adapters.methods.fields import RANK, TARGETING, TARGETS, contradiction, positive
from peft_serve.adapters.methods.forms import low_rank_or_dense, num_factored, served_rank
from peft_serve.adapters.primitives import Affine
from peft_serve.adapters.registry import Shape, Site, SiteLayout, Stored, compiles

LINEAR: Final = frozenset({SiteKind.LINEAR})


def _between_zero_and_one(value: object) -> str | None:
    return None if type(value) is float and 0 < value < 1 else "a number between 0 and 1"


def _full_only(value: object) -> str | None:
    if value == "full":
        return None
    return (
        "full: a randomised decomposition gives its singular vectors signs that change with the last bit of rounding, "
        "and the checkpoint was trained with one choice of them; retrain with psoft_svd='full'"
    )


# ---- PSOFT

PSOFT: Final = ConfigSchema(
    required={
        "r": RANK,
        "psoft_alpha": positive(1e6),  # it divides the singular values and multiplies the result: it cancels out
        "ab_svd_init": rules.one_of("psoft_init", "pissa_init"),
        "psoft_svd": _full_only,
        "psoft_orth": rules.flag,
        "psoft_mag_b": rules.flag,
        "psoft_mag_a": rules.flag,
    },
    optional={
        **TARGETING,
        "use_cayley_neumann": rules.flag,
        "num_cayley_neumann_terms": rules.integer(1, 256),
        "cayley_neumann_eps": _between_zero_and_one,
    },
    inert=frozenset({"psoft_dropout", "fan_in_fan_out", "init_weights", "psoft_svd_lowrank_niter", "random_seed"}),
)


def _psoft_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    r = config.integer("r")
    if r > min(spec.out_features, spec.in_features):
        raise contradiction("r", f"is {r}; {spec.path} has [{spec.out_features}, {spec.in_features}] and fewer ranks")
    shape: Shape = (r * (r - 1) // 2,) if config.flag("psoft_orth") else (r, r)
    tensors: dict[str, tuple[Shape, ...]] = {"psoft_R.weight": (shape,)}
    for name in ("a", "b"):
        if config.flag(f"psoft_mag_{name}"):
            tensors[f"psoft_R.vector_{name}"] = ((r,),)
    o, i, num_terms = spec.out_features, spec.in_features, max(4, config.integer("num_cayley_neumann_terms", 5))
    return SiteLayout(
        tensors=tensors,
        rank=served_rank(spec, r),
        num_values=num_factored(spec, r),
        work=work.singular_values(o, i) + work.product(o, r, r) + num_terms * work.product(r, r, r),
    )


@compiles("PSOFT", schema=PSOFT, layout=_psoft_layout, kinds=LINEAR, may_be_empty=True)
def psoft(site: Site) -> Affine:
    """U S (R - I) V^T for the r leading singular triples of W and a learned r x r map R (peft `PsoftLayer`).

    "pissa_init" gives half of S to either side. Only R is saved, in a basis of singular vectors whose signs are
    the linear-algebra library's choice: as in peft, a checkpoint is at home on the kind of machine that trained it.
    """
    r = site.config.integer("r")
    u_OK, s_K, v_KI = torch.linalg.svd(site.weight_OI, full_matrices=False)
    change_RR = _psoft_map(site) - torch.eye(r)
    if site.config.text("ab_svd_init") == "psoft_init":
        return Affine(**low_rank_or_dense(v_KI[:r], u_OK[:, :r] * s_K[:r] @ change_RR))
    half_R = s_K[:r].sqrt()
    return Affine(**low_rank_or_dense(half_R[:, None] * v_KI[:r], u_OK[:, :r] * half_R @ change_RR))


def _psoft_map(site: Site) -> Tensor:
    """R, each row scaled by vector_b and each column by vector_a."""
    weight, r = site.tensors["psoft_R.weight"], site.config.integer("r")
    map_RR = _rotation(weight, r, site.config) if site.config.flag("psoft_orth") else weight
    if "psoft_R.vector_b" in site.tensors:
        map_RR = site.tensors["psoft_R.vector_b"][:, None] * map_RR
    if "psoft_R.vector_a" in site.tensors:
        map_RR = map_RR * site.tensors["psoft_R.vector_a"]
    return map_RR


def _rotation(upper: Tensor, r: int, config: Config) -> Tensor:
    """(I + Q)(I - Q)^-1 for the skew-symmetric Q whose upper triangle is given, or the beginning of its series."""
    rows, columns = torch.triu_indices(r, r, 1)
    skew = torch.zeros(r, r).index_put((rows, columns), upper)
    skew = skew - skew.T
    if config.flag("use_cayley_neumann"):
        return _neumann(_within(skew, config), config.integer("num_cayley_neumann_terms", 5))
    # I - Q is never singular: the eigenvalues of Q are imaginary.
    rotation: Tensor = torch.linalg.solve(torch.eye(r) - skew, torch.eye(r) + skew, left=False)
    return rotation


def _within(skew: Tensor, config: Config) -> Tensor:
    """Q shrunk to a norm at which its series converges, where the config asks for that."""
    if config.raw("cayley_neumann_eps") is None:
        return skew
    eps, norm = config.number("cayley_neumann_eps"), torch.linalg.matrix_norm(skew)
    return skew * (eps / (norm + 1e-12)) if float(norm) > eps else skew


def _neumann(skew: Tensor, num_terms: int) -> Tensor:
    """I, or I + 2 Q, or I + 2 Q + ... + 2 Q^(m-1) + Q^m with m = n - 1, and 3 at least, as peft counts n terms."""
    total, power = torch.eye(skew.shape[0]), skew
    if num_terms <= 2:
        return total + 2 * (num_terms - 1) * skew
    for _ in range(max(2, num_terms - 2)):
        total = total + 2 * power
        power = power @ skew
    return total + power


# ---- OSF


def _effective_rank_rule(value: object) -> str | None:
    fine = type(value) in (int, float) and 0 < value <= 1 << 20  # type: ignore[operator]
    return None if fine else "a positive number: of ranks, or a part of them when it is at most 1.0"


OSF: Final = ConfigSchema(
    optional={
        **TARGETS,
        "effective_rank": _effective_rank_rule,
        "rank_pattern": rules.pattern(_effective_rank_rule, max_keys=512),  # each is looked for in each path
    },
    inert=frozenset({"init_weights", "target_svd_config"}),
)


def _osf_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    num_low = _num_low(spec, config)
    shapes = {"U_low": (spec.out_features, num_low), "S_low": (num_low,), "V_low": (num_low, spec.in_features)}
    size = work.singular_values(spec.out_features, spec.in_features) if num_low else 0
    return SiteLayout(
        num_values=num_factored(spec, 2 * num_low),
        work=size,
        tensors={f"osf_svd_params.{name}": (shape,) for name, shape in shapes.items()},
        rank=served_rank(spec, 2 * num_low),
    )


def _num_low(spec: SiteSpec, config: Config) -> int:
    """How many of the smallest singular triples were trained: all but the effective rank."""
    num_all = min(spec.out_features, spec.in_features)
    value = _effective_rank(config, spec.path)
    if value is None:
        kept = num_all // 2
    else:
        kept = int(num_all * value) if isinstance(value, float) and value <= 1 else min(num_all, int(value))
    if kept < 1:
        raise contradiction("effective_rank", f"keeps none of the {num_all} ranks of {spec.path}; it must keep one")
    return num_all - kept


def _effective_rank(config: Config, path: str) -> float | None:
    """The value of the first pattern found anywhere in the path: peft searches here, where others match the end."""
    patterns: Mapping[str, float] = config.fields.get("rank_pattern") or {}
    found = (value for pattern, value in patterns.items() if _is_found(pattern, path))
    value = next(found, config.raw("effective_rank"))
    return value if isinstance(value, int | float) else None


def _is_found(pattern: str, path: str) -> bool:
    text = pattern.removeprefix("^").removesuffix("$")
    at_start, at_end = pattern.startswith("^"), pattern.endswith("$")
    if at_start and at_end:
        return path == text
    return path.startswith(text) if at_start else path.endswith(text) if at_end else text in path


@compiles("OSF", schema=OSF, layout=_osf_layout, kinds=LINEAR, may_be_empty=True)
def osf(site: Site) -> Affine | None:
    """The trained low singular components in place of the base's own (arXiv:2504.07097, peft `OSFLayer`).

    What is taken away is U S V^T of the low triples of W, a product that does not depend on signs. A site that
    keeps all of its triples has nothing of its own.
    """
    u_low, s_low, v_low = (site.tensors[f"osf_svd_params.{name}_low"] for name in "USV")
    if not s_low.numel():
        return None
    u_OK, s_K, v_KI = torch.linalg.svd(site.weight_OI, full_matrices=False)
    kept = s_K.shape[0] - s_low.shape[0]
    a_RI = torch.cat([v_low, v_KI[kept:]])
    b_OR = torch.cat([u_low * s_low, -u_OK[:, kept:] * s_K[kept:]], dim=1)
    return Affine(**low_rank_or_dense(a_RI, b_OR))
