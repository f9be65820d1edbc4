"""Methods that save the two factors of a low-rank map, and numbers that weigh them."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.methods import work
from peft_serve.adapters.methods.fields import (
    RANK,
    TARGETING,
    contradiction,
    disagreement,
    positive,
    tuned_biases,
)
from peft_serve.adapters.methods.forms import low_rank_or_dense, num_factored, served_rank
from peft_serve.adapters.primitives import Affine, Dense
from peft_serve.adapters.registry import TASK_FIELD, Site, SiteLayout, Stored, compiles

LINEAR: Final = frozenset({SiteKind.LINEAR})

# ---- AdaLoRA

MAX_MASKS: Final = 2048  # 80 layers of seven projections have 560


def _masks(value: object) -> str | None:
    """The ranks that training kept, by the name of each site's singular values."""
    if not isinstance(value, dict) or len(value) > MAX_MASKS:
        return f"an object from the names of at most {MAX_MASKS} sites' lora_E to lists of true and false"
    if all(isinstance(m, list) and all(type(v) is bool for v in m) for m in value.values()):
        return None
    return "an object from the names of the sites' lora_E to lists of true and false"


ADALORA: Final = ConfigSchema(
    required={"init_r": RANK, "lora_alpha": positive(1e6)},
    optional={
        **TARGETING,
        "rank_pattern": _masks,
        "bias": tuned_biases("lora"),
        "use_dora": rules.flag,
        "ensure_weight_tying": rules.flag,
    },
    inert=frozenset(
        {
            "r",  # and all that plain LoRA has and AdaLoRA does not look at
            "lora_dropout",
            "fan_in_fan_out",
            "use_rslora",
            "lora_bias",
            "alpha_pattern",
            "init_lora_weights",
            "megatron_core",
            "qalora_group_size",
            "eva_config",
            "corda_config",
            "loftq_config",
            "lora_ga_config",
            "velora_config",
            "monteclora_config",
            *("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
        }
    ),
    refused={"megatron_config": "Megatron layers are not served; save the adapter from a plain transformers model"},
)


def _kept(config: Config, path: str) -> int:
    """How many ranks of a site the config says training kept: all of them where it says nothing."""
    masks: Any = config.raw("rank_pattern") or {}
    name = f"{path}.lora_E"
    mask = next((m for key, m in masks.items() if key == name or key.startswith(f"{name}.")), None)
    if mask is None:
        return config.integer("init_r")
    if len(mask) != config.integer("init_r"):
        raise contradiction("rank_pattern", f"has {len(mask)} entries for {path}; init_r is {config.integer('init_r')}")
    return sum(mask)


def _adalora_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    if config.flag("use_dora"):
        raise contradiction("use_dora", "is not defined for AdaLoRA; set it to false")
    r = _kept(config, spec.path)
    tensors = {"lora_A": ((r, spec.in_features),), "lora_B": ((spec.out_features, r),), "lora_E": ((r, 1),)}
    return SiteLayout(tensors=tensors, rank=served_rank(spec, r), num_values=num_factored(spec, r))


@compiles("ADALORA", schema=ADALORA, layout=_adalora_layout, may_be_empty=True)
def adalora(site: Site) -> Affine | None:
    """s B (E * A) x with s = alpha / (the rank before pruning + 1e-5) (arXiv:2303.10512, peft `SVDLinear`).

    Training prunes ranks site by site; one that keeps none stays as the base has it.
    """
    a_RI, b_OR = site.tensors["lora_E"] * site.tensors["lora_A"], site.tensors["lora_B"]
    if not a_RI.numel():
        return None
    scale = site.config.number("lora_alpha") / (site.config.integer("init_r") + 1e-5)
    return Affine(**low_rank_or_dense(a_RI, scale * b_OR))


# ---- DeLoRA

DELORA: Final = ConfigSchema(
    required={"r": RANK},
    optional={**TARGETING, "rank_pattern": rules.pattern(RANK), "bias": tuned_biases("delora")},
    inert=frozenset({"delora_lambda", "lambda_pattern", "module_dropout", "init_weights"}),  # saved as trained
)
LEAST_NORM: Final = 1e-4


def _patterned_rank(config: Config, path: str) -> int:
    value = config.for_site("rank_pattern", path)
    return config.integer("r") if value is None else int(value)


def _delora_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    r, o, i = _patterned_rank(config, spec.path), spec.out_features, spec.in_features
    tensors = {"delora_A": ((r, i),), "delora_B": ((o, r),), "delora_lambda": ((1,),), "delora_w_norm": ((i,),)}
    return SiteLayout(tensors=tensors, rank=served_rank(spec, r))


@compiles("DELORA", schema=DELORA, layout=_delora_layout, kinds=LINEAR)
def delora(site: Site) -> Affine:
    """B diag(l / (r |a_k| |b_k|)) A (n * x): ranks of equal length and a learned bound l on their sum.

    n are the lengths of the base's columns when training began (arXiv:2503.18225, peft `DeloraLinear`).
    """
    a_RI, b_OR = site.tensors["delora_A"], site.tensors["delora_B"]
    lengths_R = a_RI.norm(dim=1).clamp(min=LEAST_NORM) * b_OR.norm(dim=0).clamp(min=LEAST_NORM)
    gain_R = site.tensors["delora_lambda"] / (a_RI.shape[0] * lengths_R)
    return Affine(**low_rank_or_dense(site.tensors["delora_w_norm"] * a_RI, gain_R * b_OR))


# ---- LoHa

LOHA: Final = ConfigSchema(
    required={"r": RANK, "alpha": rules.number(1e6)},
    optional={
        **TARGETING,
        "rank_pattern": rules.pattern(RANK),
        "alpha_pattern": rules.pattern(rules.number(1e6)),
    },
    inert=frozenset({"rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"}),  # of convolutions
)


def _loha_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    r, o, i = _patterned_rank(config, spec.path), spec.out_features, spec.in_features
    left, right = ((o, r),), ((r, i),)
    tensors = {"hada_w1_a": left, "hada_w1_b": right, "hada_w2_a": left, "hada_w2_b": right}
    rank = r * r
    return SiteLayout(
        tensors=tensors,
        rank=served_rank(spec, rank),
        num_values=num_factored(spec, rank),
        work=2 * work.product(o, r, i),
    )


@compiles("LOHA", schema=LOHA, layout=_loha_layout, kinds=LINEAR)
def loha(site: Site) -> Affine:
    """s (B1 A1) * (B2 A2), product by element, s = alpha / r (arXiv:2108.06098, peft `LoHaLayer`).

    It has rank r^2: its factors are the products of each column of B1 with each of B2, and the same of A's rows.
    """
    b1_OR, a1_RI, b2_OR, a2_RI = (site.tensors[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    r, alpha = a1_RI.shape[0], site.config.for_site("alpha_pattern", site.spec.path)
    scale = (site.config.number("alpha") if alpha is None else float(alpha)) / r
    if not served_rank(site.spec, r * r):
        return Affine(maps=(Dense(scale * (b1_OR @ a1_RI) * (b2_OR @ a2_RI)),))
    a_RI = (a1_RI[:, None] * a2_RI[None]).flatten(end_dim=1)
    b_OR = (b1_OR[:, :, None] * b2_OR[:, None]).flatten(start_dim=1)
    return Affine(**low_rank_or_dense(a_RI, scale * b_OR))


# ---- HRA

HRA: Final = ConfigSchema(
    required={"r": RANK, "apply_GS": rules.flag},
    optional={**TARGETING, "bias": tuned_biases("hra")},
    inert=frozenset({"init_weights"}),
)


def _hra_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    r, i = config.integer("r"), spec.in_features
    if r > i:
        raise contradiction("r", f"is {r}; {spec.path} has {i} inputs and no more directions to reflect")
    return SiteLayout(
        tensors={"hra_u": ((i, r),)},
        rank=served_rank(spec, r),
        num_values=num_factored(spec, r),
        work=work.product(spec.out_features, i, r) + work.orthogonal(i, r) + work.product(i, r, r),
    )


@compiles("HRA", schema=HRA, layout=_hra_layout, kinds=LINEAR)
def hra(site: Site) -> Affine:
    """W H_1 ... H_r with reflections H_k = I - 2 u_k u_k^T (arXiv:2405.17484, peft `HRALinear`).

    The product of reflections is I - U T U^T with a small triangular T, so what is added to W is low-rank:
    -(W U T) U^T. With `apply_GS` the u_k are made orthonormal first, and T is 2 I.
    """
    u_IR = site.tensors["hra_u"].double()
    if site.config.flag("apply_GS"):
        u_IR = torch.linalg.qr(u_IR).Q
        t_RR = 2 * torch.eye(u_IR.shape[1], dtype=u_IR.dtype)
    else:
        u_IR = u_IR / u_IR.norm(dim=0)
        t_RR = _compact(u_IR)
    b_OR = -(site.weight_OI @ (u_IR @ t_RR).float())
    return Affine(**low_rank_or_dense(u_IR.T.float(), b_OR))


def _compact(u_IR: Tensor) -> Tensor:
    """T of H_1 ... H_r = I - U T U^T for unit columns of U: the inverse of U^T U above the diagonal and 1/2 on it."""
    identity = torch.eye(u_IR.shape[1], dtype=u_IR.dtype)
    inverse = torch.triu(u_IR.T @ u_IR, diagonal=1) + identity / 2
    t_RR: Tensor = torch.linalg.solve_triangular(inverse, identity, upper=True)
    return t_RR


# ---- Poly

COUNT: Final = rules.integer(1, 1 << 16)
POLY: Final = ConfigSchema(
    required={
        "r": RANK,
        "n_tasks": COUNT,
        "n_skills": COUNT,
        "n_splits": COUNT,
        "poly_type": rules.one_of("poly"),
    },
    optional=dict.fromkeys(("target_modules", "exclude_modules"), rules.names_or_text),
    inert=frozenset({"init_weights"}),
)


def _poly_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    r, skills, splits = (config.integer(name) for name in ("r", "n_skills", "n_splits"))
    o, i = spec.out_features, spec.in_features
    if o % splits or i % splits:
        raise contradiction("n_splits", f"is {splits}; {spec.path} has [{o}, {i}], which it does not divide")
    tensors = {
        "poly_lora_A": ((splits, skills, i // splits, r),),
        "poly_lora_B": ((splits, skills, r, o // splits),),
        "poly_router.module_logits": ((config.integer("n_tasks"), splits * skills),),
    }
    return SiteLayout(tensors=tensors, rank=served_rank(spec, r))


def _num_tasks(config: Config) -> int:
    return config.integer("n_tasks")


@compiles("POLY", schema=POLY, layout=_poly_layout, kinds=LINEAR, num_tasks=_num_tasks)
def poly(site: Site) -> Affine:
    """(1 / r) B A of the task's own mixture of skills (arXiv:2202.13914, 2211.03831, peft `PolyLayer`).

    Each split of the features mixes the skills' factors with weights that sum to one: the sigmoids of the task's
    logits over their sum.
    """
    logits = site.tensors["poly_router.module_logits"]
    task = site.config.integer(TASK_FIELD, 0)
    if not 0 <= task < logits.shape[0]:
        raise disagreement(TASK_FIELD, f"is {task}; the adapter has tasks 0 ... {logits.shape[0] - 1}")
    a_QSDR, b_QSRD = site.tensors["poly_lora_A"], site.tensors["poly_lora_B"]
    open_QS = torch.sigmoid(logits[task]).reshape(a_QSDR.shape[:2])
    weights_QS = open_QS / (open_QS.sum(dim=-1, keepdim=True) + 1e-12)
    a_IR = torch.einsum("qs,qsdr->qdr", weights_QS, a_QSDR).flatten(end_dim=1)
    b_OR = torch.einsum("qs,qsrd->qdr", weights_QS, b_QSRD).flatten(end_dim=1)
    return Affine(**low_rank_or_dense(a_IR.T, b_OR / a_IR.shape[1]))
