"""What a LoRA config says: its fields, the variant it asks for, and a site's rank and scale.

Knows no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import Base
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.records import CONFIG_FILE
from peft_serve.adapters.registry import SharedLayout, Stored
from peft_serve.adapters.token_rows import token_ids, token_ids_by_module
from peft_serve.errors import AdapterInvalid, Refusal

DEFAULT_RANK: Final = 8
MAX_INVOCATION: Final = 1024
MAX_PARAMETERS: Final = 1024
ALWAYS_ON: Final = ("modules_to_save", "trainable_token_indices", "target_parameters")
PLAIN_INITS: Final = ("gaussian", "eva", "orthogonal", "mica")
BASE_CHANGING_INITS: Final = ("pissa", "olora")
CONVERT: Final = (
    "convert the checkpoint to plain LoRA with save_pretrained(path_initial_model_for_weight_conversion=...)"
)
NOT_RECOMPUTABLE: Final = (
    ("pissa_niter", "a randomised SVD of the base that no seed of ours repeats"),
    ("corda", "the data it was calibrated on"),
    ("loftq", "the error of a quantised base"),
    ("lora_ga", "gradients taken when training began"),
)


def _initialisation(value: object) -> str | None:
    if isinstance(value, bool) or value in PLAIN_INITS or value in BASE_CHANGING_INITS:
        return None
    served = f"true, false or one of {', '.join(PLAIN_INITS + BASE_CHANGING_INITS)}"
    for name, origin in NOT_RECOMPUTABLE:
        if isinstance(value, str) and value.startswith(name):
            return f"{served}: this one changed the base by {origin}, which cannot be recomputed; {CONVERT}"
    return f"{served}; {CONVERT}"


def _block_diagonal(value: object) -> str | None:
    if not isinstance(value, dict):
        return "an object as peft's BdLoraConfig"
    for name in ("target_modules_bd_a", "target_modules_bd_b"):
        if value.get(name) is not None and rules.names(MAX_PARAMETERS)(value[name]) is not None:
            return f"an object whose {name} is a list of module names"
    if rules.integer(1, 1 << 20)(value.get("nblocks", 1)) is not None:
        return "an object whose nblocks is a positive integer"
    unknown = sorted(value.keys() - {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"})
    return f"an object without the field {unknown[0][:64]!r}" if unknown else None


def _settings(value: object) -> str | None:
    return None if isinstance(value, dict) else "an object"


def _invocation(value: object) -> str | None:
    fits = isinstance(value, list) and len(value) <= MAX_INVOCATION and all(type(v) is int and v >= 0 for v in value)
    return None if fits else f"a list of at most {MAX_INVOCATION} token ids"


def _token_indices(value: object) -> str | None:
    return token_ids_by_module(value) if isinstance(value, dict) else token_ids(value)


LORA: Final = ConfigSchema(
    required={"r": rules.integer(1, 1 << 20), "lora_alpha": rules.number(1e6)},
    optional={
        "target_modules": rules.names_or_text,
        "exclude_modules": rules.names_or_text,
        "layers_to_transform": rules.layer_numbers,
        "layers_pattern": rules.names_or_text,
        "target_parameters": rules.names(MAX_PARAMETERS),
        "bias": rules.one_of("none", "all", "lora_only"),
        "use_rslora": rules.flag,
        "use_dora": rules.flag,
        "use_qalora": rules.flag,
        "qalora_group_size": rules.integer(1, 1 << 20),
        "use_bdlora": _block_diagonal,
        "kasa_config": _settings,
        "alora_invocation_tokens": _invocation,
        "trainable_token_indices": _token_indices,
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
        "loftq_config": f"LoftQ changed the base's weights by the error of a quantised base; {CONVERT}",
    },
)


class Variant(StrEnum):
    """The variants of LoRA that change what a site computes, by the field that asks for them."""

    PLAIN = "plain"
    DORA = "use_dora"
    BLOCK_DIAGONAL = "use_bdlora"
    POOLED = "use_qalora"
    ACTIVATED = "alora_invocation_tokens"
    KASA = "kasa_config"
    VELORA = "velora_config"  # plain when it is served, and still no companion of another
    MONTECLORA = "monteclora_config"


def variants(config: Config) -> tuple[Variant, ...]:
    """Every variant that the config asks for; peft defines none together with another."""
    return tuple(v for v in Variant if v is not Variant.PLAIN and config.raw(v) not in (None, False, []))


def variant(config: Config) -> Variant:
    return next(iter(variants(config)), Variant.PLAIN)


def check(config: Config, base: Base, stored: Stored) -> SharedLayout:  # noqa: ARG001 - one signature for every method
    """LoRA shares no tensors; this is where its config is checked as a whole. Raises `AdapterInvalid`."""
    refusals = []
    asked = variants(config)
    if len(asked) > 1:
        refusals.append(_refusal(asked[1], f"is not defined together with {asked[0]} in peft; use one of them"))
    if asked and config.raw("init_lora_weights") == "mica":
        refusals.append(_refusal(asked[0], "is not defined together with MiCA in peft; use one of them"))
    if Variant.ACTIVATED in asked:
        refusals.extend(_activation_refusals(config, base))
    if refusals:
        raise AdapterInvalid(refusals)
    return SharedLayout()


def _activation_refusals(config: Config, base: Base) -> list[Refusal]:
    """An activated LoRA is the base before its invocation; whatever else it changes would act there too."""
    refusals = []
    vocab_size = base.shape.vocab_size
    if any(token >= vocab_size for token in invocation(config)):
        refusals.append(_refusal(Variant.ACTIVATED, f"holds an id beyond the base's vocabulary of {vocab_size}"))
    if base.shape.is_encoder_decoder or base.shape.is_encoder:
        refusals.append(_refusal(Variant.ACTIVATED, "needs a decoder-only base, as in peft; retrain as plain LoRA"))
    always_on = [name for name in ALWAYS_ON if config.raw(name)]
    if config.text("bias", "none") != "none":
        always_on.append("bias")
    if config.raw("init_lora_weights") in BASE_CHANGING_INITS:
        always_on.append("init_lora_weights")
    refusals += [
        _refusal(name, "acts before the invocation tokens too, where an activated LoRA is the base; train without it")
        for name in always_on
    ]
    return refusals


def _refusal(field: str, reason: str) -> Refusal:
    return Refusal(f"{CONFIG_FILE}: {field}", reason)


def invocation(config: Config) -> tuple[int, ...]:
    """The token ids that switch the adapter on; empty: it is always on (aLoRA, arXiv:2504.12397)."""
    value = config.raw("alora_invocation_tokens")
    return tuple(value) if isinstance(value, list) else ()


def rank_at(config: Config, path: str) -> int:
    value = config.for_site("rank_pattern", path)
    return config.integer("r", DEFAULT_RANK) if value is None else int(value)


def scale_at(config: Config, path: str, rank: int) -> float:
    value = config.for_site("alpha_pattern", path)
    alpha = config.number("lora_alpha") if value is None else float(value)
    return alpha / (math.sqrt(rank) if config.flag("use_rslora") else rank)


def block_diagonal_side(config: Config, path: str) -> str:
    """Which factor is stored as its blocks: "a", "b" or neither. peft looks for the names anywhere in the path."""
    settings = _mapping(config.raw("use_bdlora"))
    named = {side: settings.get(f"target_modules_bd_{side}") or [] for side in ("a", "b")}
    sides = [side for side, names in named.items() if any(name in path for name in names)]
    if len(sides) > 1:
        raise AdapterInvalid([_refusal("use_bdlora", f"names both factors of {path}; a site has one in blocks")])
    if not sides and settings.get("match_strict", True):
        raise AdapterInvalid([_refusal("use_bdlora", f"names neither factor of {path} and match_strict is on")])
    return sides[0] if sides else ""


def num_blocks(config: Config) -> int:
    return int(_mapping(config.raw("use_bdlora")).get("nblocks", 1))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else MappingProxyType({})
