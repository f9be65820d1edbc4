"""Methods that change single entries of a weight."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.methods.fields import RANK, TARGETS, contradiction, disagreement
from peft_serve.adapters.primitives import Affine, LowRank, Sparse
from peft_serve.adapters.registry import Shape, Site, SiteLayout, Stored, compiles

LINEAR: Final = frozenset({SiteKind.LINEAR})


def _sparsity(value: object) -> str | None:
    fine = type(value) in (int, float) and 0 <= value < 1  # type: ignore[operator]
    return None if fine else "a number from 0 up to, and not including, 1"


# ---- SHiRA

SHIRA: Final = ConfigSchema(
    required={"r": RANK},
    optional=TARGETS,
    inert=frozenset({"mask_type", "random_seed", "fan_in_fan_out", "init_weights"}),  # the file has the indices
)


def _shira_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    num_entries = config.integer("r") * (spec.out_features + spec.in_features)
    if num_entries > spec.out_features * spec.in_features:
        reason = f"asks for {num_entries} entries of {spec.path}, which has {spec.out_features * spec.in_features}"
        raise contradiction("r", reason)
    return SiteLayout(
        tensors={"shira_weight": ((num_entries,),), "shira_indices": ((2, num_entries),)},
        indices={"shira_indices": max(spec.out_features, spec.in_features)},
    )


@compiles("SHIRA", schema=SHIRA, layout=_shira_layout, kinds=LINEAR)
def shira(site: Site) -> Affine:
    """W plus values at the places the file names; values at one place add up (arXiv:2406.13175, peft `ShiraLayer`)."""
    out_N, in_N = site.tensors["shira_indices"]
    if int(out_N.max()) >= site.spec.out_features or int(in_N.max()) >= site.spec.in_features:
        reason = f"names an entry outside [{site.spec.out_features}, {site.spec.in_features}]; save the adapter again"
        raise disagreement(f"{site.spec.path}.shira_indices", reason)
    return Affine(maps=(Sparse(out_N, in_N, site.tensors["shira_weight"]),))


# ---- Super-Tuning

SUPERTUNING: Final = ConfigSchema(
    required={"sparsity": _sparsity, "select_top": rules.flag, "save_precomputed_indices": rules.flag},
    optional={**TARGETS, "r": RANK, "lora_alpha": rules.number(1e6)},
    inert=frozenset({"lora_dropout", "init_weights"}),
)
INDICES: Final = "supertuning_indices"


def _super_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    num_places = spec.out_features * spec.in_features
    num_entries = int(num_places * (1 - config.number("sparsity")))
    if num_entries < 1:
        raise contradiction("sparsity", f"leaves no entry of {spec.path} to change")
    rank = config.integer("r")
    tensors: dict[str, tuple[Shape, ...]] = {"supertuning_values": ((num_entries,),)}
    if config.flag("save_precomputed_indices"):
        tensors[INDICES] = ((num_entries,),)
    if rank:
        tensors["supertuning_lora_A.weight"] = ((rank, spec.in_features),)
        tensors["supertuning_lora_B.weight"] = ((spec.out_features, rank),)
    return SiteLayout(tensors=tensors, rank=rank, indices={INDICES: num_places})


@compiles("SUPERTUNING", schema=SUPERTUNING, layout=_super_layout, kinds=LINEAR)
def supertuning(site: Site) -> Affine:
    """W plus values at its largest (or smallest) entries, and a LoRA beside them in "Supra" mode.

    arXiv:2607.09287, peft `SupertuningLayer`. Where the file does not say which entries these are, they are found
    in the base again; entries of one magnitude keep the order in which torch's `topk` gives them.
    """
    flat_N = site.tensors[INDICES] if INDICES in site.tensors else _largest(site)
    width = site.spec.in_features
    entries = Sparse(flat_N // width, flat_N % width, site.tensors["supertuning_values"])
    return Affine(maps=(entries,), delta=_supra(site))


def _largest(site: Site) -> Tensor:
    num_entries = site.tensors["supertuning_values"].shape[0]
    magnitudes = site.weight_OI.abs().flatten()
    return torch.topk(magnitudes, num_entries, largest=site.config.flag("select_top")).indices


def _supra(site: Site) -> LowRank | None:
    """The low-rank part, if the config has a rank; alpha is twice the rank unless the config says otherwise."""
    rank = site.config.integer("r")
    if not rank:
        return None
    scale = 2.0 if site.config.raw("lora_alpha") is None else site.config.number("lora_alpha") / rank
    return LowRank(site.tensors["supertuning_lora_A.weight"], scale * site.tensors["supertuning_lora_B.weight"])
