"""Methods whose low-rank factor is a function of the base's own weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.methods import work
from peft_serve.adapters.methods.fields import RANK, TARGETING, tuned_biases
from peft_serve.adapters.methods.forms import low_rank_or_dense, num_factored, served_rank
from peft_serve.adapters.primitives import Affine
from peft_serve.adapters.registry import Shape, Site, SiteLayout, Stored, compiles

# ---- DEFT

DEFT: Final = ConfigSchema(
    required={"r": RANK, "decomposition_method": rules.one_of("relu", "qr"), "para": rules.flag},
    optional={**TARGETING, "alpha": rules.number(1e6), "bias": tuned_biases("deft")},
    inert=frozenset({"deft_dropout", "fan_in_fan_out", "init_scale", "init_weights"}),
)


def _deft_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    r = min(config.integer("r"), spec.out_features)  # peft caps it: no more directions than outputs
    tensors: dict[str, tuple[Shape, ...]] = {"deft_P": ((spec.out_features, r),)}
    if not config.flag("para"):
        tensors["deft_R"] = ((r, spec.in_features),)
    return SiteLayout(
        tensors=tensors,
        rank=served_rank(spec, r),
        num_values=num_factored(spec, r),
        work=work.product(r, spec.out_features, spec.in_features) + work.orthogonal(spec.out_features, r),
    )


@compiles("DEFT", schema=DEFT, layout=_deft_layout)
def deft(site: Site) -> Affine:
    """Q (s R - G^T W): what W does along some directions, taken away and put anew (peft `DeftLinear`).

    "qr" takes for Q and G the orthonormal columns of P, "relu" takes P and relu(P). With `para` nothing is put
    anew (PaRa, arXiv:2406.05641): -Q G^T W.
    """
    p_OR = site.tensors["deft_P"]
    q_OR, g_OR = (p_OR, p_OR.relu())
    if site.config.text("decomposition_method") == "qr":
        q_OR = g_OR = torch.linalg.qr(p_OR).Q
    a_RI = -(g_OR.T @ site.weight_OI)
    if "deft_R" in site.tensors:
        a_RI = a_RI + _deft_scale(site.config, p_OR.shape[1]) * site.tensors["deft_R"]
    return Affine(**low_rank_or_dense(a_RI, q_OR))


def _deft_scale(config: Config, rank: int) -> float:
    """alpha / r, or 1 where alpha is absent or zero."""
    return config.number("alpha") / rank if config.raw("alpha") else 1.0


# ---- PEANuT

ACTIVATIONS: Final = tuple(sorted(frozenset(ACT2FN) - {"prelu", "xielu"}))
"""transformers' activations less those that have parameters of their own, which no checkpoint of PEANuT brings."""

PEANUT: Final = ConfigSchema(
    required={
        "r": RANK,
        "depth": rules.integer(0, 64),
        "act_fn": rules.one_of(*ACTIVATIONS),
        "scaling": rules.number(1e6),
    },
    optional=TARGETING,
    inert=frozenset({"init_weights"}),
)


def _peanut_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    r, depth = config.integer("r"), config.integer("depth")
    tensors: dict[str, tuple[Shape, ...]] = {
        "peanut_A.weight": ((r, spec.out_features),),
        "peanut_B.weight": ((spec.out_features, r),),
    }
    for side in ("encoders", "decoders"):
        tensors |= {f"peanut_{side}.{k}.weight": ((r, r),) for k in range(depth)}
    return SiteLayout(
        tensors=tensors,
        rank=served_rank(spec, r),
        num_values=num_factored(spec, r),
        work=work.product(spec.in_features, spec.out_features, r) + 2 * depth * work.product(spec.in_features, r, r),
    )


@compiles("PEANUT", schema=PEANUT, layout=_peanut_layout, kinds=frozenset({SiteKind.LINEAR}))
def peanut(site: Site) -> Affine:
    """B applied to a small network of the columns of W (arXiv:2410.01870, peft `PeanutLayer`).

    The network is not linear in W and the result is linear in x: once W is fixed, it is a low-rank term. With g
    the activation, h = g(W^T A^T); each encoder gives h = g(h E^T); each decoder h = g(h D^T) + the h before the
    encoder it mirrors.
    """
    act: Callable[[Tensor], Tensor] = ACT2FN[site.config.text("act_fn")]
    depth, tensors = site.config.integer("depth"), site.tensors
    hidden_IR = act(site.weight_OI.T @ tensors["peanut_A.weight"].T)
    before: list[Tensor] = []
    for k in range(depth):
        before.append(hidden_IR)
        hidden_IR = act(hidden_IR @ tensors[f"peanut_encoders.{k}.weight"].T)
    for k in range(depth):
        hidden_IR = act(hidden_IR @ tensors[f"peanut_decoders.{k}.weight"].T) + before.pop()
    b_OR = site.config.number("scaling") * tensors["peanut_B.weight"]
    return Affine(**low_rank_or_dense(hidden_IR.T.contiguous(), b_OR))
