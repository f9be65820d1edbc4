"""Methods that compile to a low-rank term: LoRA and its variants."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.primitives import Affine, LowRank
from peft_serve.adapters.records import CONFIG_FILE
from peft_serve.adapters.registry import DENSE, Shape, Site, SiteLayout, Stored, compiles
from peft_serve.errors import AdapterInvalid, Refusal

DEFAULT_RANK: Final = 8
TRAINING_INITS: Final = ("gaussian", "eva", "orthogonal", "mica")
CONVERT: Final = (
    "changed the base's weights when training began; convert the checkpoint to plain LoRA with "
    "save_pretrained(path_initial_model_for_weight_conversion=...)"
)


def _initialisation(value: object) -> str | None:
    if isinstance(value, bool) or value in TRAINING_INITS:
        return None
    return f"true, false or one of {', '.join(TRAINING_INITS)}: any other way to initialise {CONVERT}"


LORA: Final = ConfigSchema(
    required={"r": rules.integer(1, 1 << 20), "lora_alpha": rules.number(1e6)},
    optional={
        "target_modules": rules.names_or_text,
        "exclude_modules": rules.names_or_text,
        "layers_to_transform": rules.layer_numbers,
        "layers_pattern": rules.names_or_text,
        "bias": rules.one_of("none", "all", "lora_only"),
        "use_rslora": rules.flag,
        "use_dora": rules.flag,
        "lora_bias": rules.flag,
        "ensure_weight_tying": rules.flag,
        "rank_pattern": rules.pattern(rules.integer(1, 1 << 20)),
        "alpha_pattern": rules.pattern(rules.number(1e6)),
        "init_lora_weights": _initialisation,
    },
    inert=frozenset(
        {
            "lora_dropout",
            "fan_in_fan_out",  # the tensors have one layout; the kind of the site says how the base stores its own
            "megatron_core",
            "qalora_group_size",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "velora_config",
            "monteclora_config",
        }
    ),
    refused={
        "megatron_config": "Megatron layers are not served; save the adapter from a plain transformers model",
        "arrow_config": "an Arrow router chooses between other adapters at run time; upload those adapters instead",
        "use_qalora": "QALoRA fits a GPTQ base only; merge and retrain as plain LoRA",
        "use_bdlora": "block-diagonal LoRA is not served yet; expand it to plain LoRA",
        "alora_invocation_tokens": "activated LoRA is not served yet; retrain as plain LoRA",
        "kasa_config": f"KaSA {CONVERT}",
        "loftq_config": f"LoftQ {CONVERT}",
    },
)


def _rank(config: Config, path: str) -> int:
    value = config.for_site("rank_pattern", path)
    return config.integer("r", DEFAULT_RANK) if value is None else int(value)


def _scale(config: Config, path: str, rank: int) -> float:
    value = config.for_site("alpha_pattern", path)
    alpha = config.number("lora_alpha") if value is None else float(value)
    return alpha / (math.sqrt(rank) if config.flag("use_rslora") else rank)


def _layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    rank = _rank(config, spec.path)
    a_shape, b_shape = (rank, spec.in_features), (spec.out_features, rank)
    tensors: dict[str, tuple[Shape, ...]]
    if spec.kind is SiteKind.EMBEDDING:
        tensors = {"lora_embedding_A": (a_shape,), "lora_embedding_B": (b_shape,)}
    else:
        tensors = {"lora_A.weight": (a_shape,), "lora_B.weight": (b_shape,)}
        if config.flag("lora_bias"):
            tensors["lora_B.bias"] = ((spec.out_features,),)
    if config.flag("use_dora"):
        if config.flag("lora_bias"):
            place = f"{CONFIG_FILE}: lora_bias"
            raise AdapterInvalid([Refusal(place, "is not defined together with use_dora; set one of them to false")])
        tensors["lora_magnitude_vector"] = ((spec.out_features,),)
    return SiteLayout(tensors=tensors, rank=rank, leftovers=("lora_velora_embed", "lora_monteclora_sampler."))


@compiles("LORA", schema=LORA, layout=_layout, kinds=DENSE | {SiteKind.EMBEDDING})
def lora(site: Site) -> Affine:
    """y = W x + b + s B A x, with s = alpha / r, or alpha / sqrt(r) for rsLoRA (peft `LoraLayer`).

    DoRA scales each row of W + s B A to the length m that was learned: with g = m / |W + s B A| the output is
    g (W x) + b + g s B A x, the bias staying as it is (arXiv:2402.09353, peft `DoraLinearLayer`).
    """
    if site.spec.kind is SiteKind.EMBEDDING:
        a_RI, b_OR = site.tensors["lora_embedding_A"], site.tensors["lora_embedding_B"]
    else:
        a_RI, b_OR = site.tensors["lora_A.weight"], site.tensors["lora_B.weight"]
    scale = _scale(site.config, site.spec.path, a_RI.shape[0])
    b_OR = scale * b_OR
    if "lora_magnitude_vector" in site.tensors:
        return _with_magnitude(site, LowRank(a_RI, b_OR))
    bias = site.tensors.get("lora_B.bias")
    shift = None if bias is None else scale * bias
    return Affine(delta=LowRank(a_RI, site.spec.embed_scale * b_OR), shift=shift)


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
