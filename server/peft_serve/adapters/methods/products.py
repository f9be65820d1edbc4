"""Methods that multiply the base's weight, entry by entry or row by row."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.methods import work
from peft_serve.adapters.methods.fields import RANK, TARGETING, TARGETS, disagreement
from peft_serve.adapters.methods.forms import num_dense
from peft_serve.adapters.primitives import Affine, Dense, LowRank
from peft_serve.adapters.registry import DENSE, Shape, Site, SiteLayout, Stored, compiles

# ---- HiRA

HIRA: Final = ConfigSchema(
    required={"r": RANK},
    optional={**TARGETING, "rank_pattern": rules.pattern(RANK)},
    inert=frozenset({"hira_dropout", "fan_in_fan_out", "init_weights"}),
)


def _hira_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    own = config.for_site("rank_pattern", spec.path)
    r = config.integer("r") if own is None else int(own)
    name = "hira_embedding" if spec.kind is SiteKind.EMBEDDING else "hira"
    return SiteLayout(
        tensors={f"{name}_A": ((r, spec.in_features),), f"{name}_B": ((spec.out_features, r),)},
        num_values=num_dense(spec),
        work=work.product(spec.out_features, r, spec.in_features),
    )


@compiles("HIRA", schema=HIRA, layout=_hira_layout, kinds=DENSE | {SiteKind.EMBEDDING})
def hira(site: Site) -> Affine:
    """W * (B A), entry by entry: a full matrix (HiRA, ICLR 2025; peft `HiraLayer`).

    A scaled embedding scales what it looks up and not, in peft, what HiRA adds.
    """
    name = "hira_embedding" if site.spec.kind is SiteKind.EMBEDDING else "hira"
    return Affine(maps=(Dense(site.weight_OI * (site.tensors[f"{name}_B"] @ site.tensors[f"{name}_A"])),))


# ---- GLoRA


def _no_tuned_bias(value: object) -> str | None:
    return None if value == "none" else "none: a bias that is tuned beside GLoRA's own bias paths is not served"


GLORA: Final = ConfigSchema(
    required={
        "r": RANK,
        "config_A_B": rules.one_of("lora", "vector", "constant", "none"),
        "config_C": rules.one_of("lora", "vector", "none"),
        "config_D_E": rules.one_of("vector", "constant", "none"),
    },
    optional={**TARGETS, "bias": _no_tuned_bias},
    inert=frozenset({"init_weights"}),
)
PATHS: Final = ("A", "B", "C", "D", "E")


def _glora_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    tensors: dict[str, tuple[Shape, ...]] = {}
    for name in PATHS:
        shapes = _path_shapes(name, _mode(name, spec, config), spec, config.integer("r"))
        tensors |= {f"glora_{name}.{part}": (shape,) for part, shape in shapes.items()}
    is_rows = config.text("config_A_B") in ("vector", "constant")
    is_full = config.text("config_A_B") == "lora"
    return SiteLayout(tensors=tensors, rank=1 if is_rows else 0, num_values=num_dense(spec) if is_full else 0)


def _mode(name: str, spec: SiteSpec, config: Config) -> str:
    """How a path is parametrised; those of the bias need one."""
    if name in ("A", "B"):
        return config.text("config_A_B")
    field = "config_C" if name == "C" else "config_D_E"
    return config.text(field) if spec.has_bias else "none"


def _path_shapes(name: str, mode: str, spec: SiteSpec, r: int) -> dict[str, Shape]:
    num_out, num_in = spec.out_features, spec.in_features
    rows, columns = {"A": (num_out, num_in), "B": (num_out, num_in), "C": (num_in, 1)}.get(name, (num_out, 0))
    if mode == "lora":
        return {"Xd": (rows, r), "Xu": (r, columns)}
    if mode == "constant":
        return {"X": (1,)}
    if mode == "vector":
        return {"X": (rows, 1) if columns else (rows,)}
    return {"zeros": (rows, columns) if columns else (rows,)}


@compiles("GLORA", schema=GLORA, layout=_glora_layout, kinds=frozenset({SiteKind.LINEAR}))
def glora(site: Site) -> Affine:
    """(W + W * A + B) x + b + b * D + E + W C, products entry by entry (arXiv:2306.07967, peft `GloraLayer`).

    One A for each row, or for all, is an output scale s = 1 + A, which leaves the bias alone; one B for each row
    adds to each output that multiple of the sum of x. C, D and E act where the base has a bias.
    """
    mode, a, b = site.config.text("config_A_B"), _path(site, "A"), _path(site, "B")
    bias_O, num_out = site.bias_O, site.spec.out_features
    shift = None if bias_O is None else _bias_change(site, bias_O)
    if mode == "none":
        return Affine(shift=shift)
    if mode == "lora":
        return Affine(maps=(Dense(site.weight_OI * a + b),), shift=shift)
    scale_O = 1 + a.flatten().expand(num_out)
    if shift is not None and bias_O is not None:
        shift = shift + (1 - scale_O) * bias_O
    sums = LowRank(torch.ones(1, site.spec.in_features), b.flatten().expand(num_out)[:, None].contiguous())
    return Affine(out_scale=scale_O, delta=sums, shift=shift)


def _bias_change(site: Site, bias_O: Tensor) -> Tensor:
    return bias_O * _path(site, "D") + _path(site, "E") + (site.weight_OI @ _path(site, "C")).flatten()


def _path(site: Site, name: str) -> Tensor:
    """The value of one of the five paths. A path that is not used is saved as zeros, which must be zero."""
    tensors, key = site.tensors, f"glora_{name}"
    if f"{key}.Xd" in tensors:
        return tensors[f"{key}.Xd"] @ tensors[f"{key}.Xu"]
    if f"{key}.X" in tensors:
        return tensors[f"{key}.X"]
    zeros = tensors[f"{key}.zeros"]
    if bool(zeros.any()):
        raise disagreement(
            f"{site.spec.path}.{key}.zeros", "belongs to an unused path and holds something; save it again"
        )
    return zeros
