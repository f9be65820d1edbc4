"""The fields of each method that `adapters` describes in `adapter_config.json`: what they may hold, or why not.

Knows no file, no tensors and no base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.config_schema import Config, Rule, is_empty
from peft_serve.adapters.records import CONFIG_FILE
from peft_serve.adapters.verdict import Verdict, quoted

ACTIVATIONS: Final = (
    "relu",
    "gelu",
    "gelu_new",
    "gelu_fast",
    "quick_gelu",
    "swish",
    "silu",
    "tanh",
    "leakyrelu",
    "sigmoid",
    "relu6",
    "mish",
    "linear",
)
MAX_LAYERS: Final = 4096
UNKNOWN: Final = "is a field that this server does not know and will not ignore; remove it, or set it to null"
GATED: Final = (
    "averages a gate over the whole sequence, so that a token would depend on the ones behind it; train with "
    "use_gating=False"
)


def _positive(value: object) -> str | None:
    fine = type(value) in (int, float) and 0 < value <= 1e6  # type: ignore[operator]
    return None if fine else "a number above 0"


def _reduction(value: object) -> str | None:
    if not isinstance(value, dict):
        return _positive(value)
    keys_fit = all(key == "default" or (key.isdecimal() and len(key) < 6) for key in value)
    if keys_fit and not any(_positive(item) for item in value.values()):
        return None
    return "a number above 0, or an object from layer numbers and 'default' to such numbers"


def _scaling(value: object) -> str | None:
    return None if value in ("learned", "channel") else rules.number(1e6)(value) and "a number, learned or channel"


def _kept(value: object) -> str | None:
    return None if isinstance(value, bool) or value == "post_add" else "true, false or post_add"


def _layers(value: object) -> str | None:
    fine = isinstance(value, list) and len(value) <= MAX_LAYERS and all(type(n) is int for n in value)
    return None if fine else "a list of layer numbers"


def _acting_layers(value: object) -> str | None:
    return None if value == "all" or _layers(value) is None else "all, or a list of layer numbers"


def _projections(value: object) -> str | None:
    fine = isinstance(value, list) and value and all(name in ("q", "k", "v") for name in value)
    return None if fine else "a list of some of q, k and v"


def _activation(value: object) -> str | None:
    fine = isinstance(value, str) and value.lower() in ACTIVATIONS
    return None if fine else "one of " + ", ".join(ACTIVATIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """The fields of one method. `defaults` are those of the library for a field that is absent."""

    required: Mapping[str, Rule]
    optional: Mapping[str, Rule]
    defaults: Mapping[str, Any]
    inert: frozenset[str]
    refused: Mapping[str, str] = field(default_factory=dict)

    def check(self, fields: Mapping[str, Any], verdict: Verdict) -> Config:
        """Refuse in `verdict` every field that breaks its rule; the result is for use only when none did."""
        for name in self.required.keys() - fields.keys():
            verdict.refuse(place_of(name), "is missing; upload the file as adapters wrote it")
        for name, value in fields.items():
            rule = self.required.get(name) or self.optional.get(name)
            if rule is not None:
                expected = None if value is None and name not in self.required else rule(value)
                if expected is not None:
                    verdict.refuse(place_of(name), f"is {quoted(value)}; it must be {expected}")
            elif name not in self.inert and name != "architecture" and not is_empty(value):
                verdict.refuse(place_of(name), self.refused.get(name, UNKNOWN))
        given = {name: value for name, value in fields.items() if value is not None}
        return Config({**self.defaults, **given})


def place_of(name: str) -> str:
    """What a refusal calls a field of the method."""
    return f"{CONFIG_FILE}: config.{name[:64]}"


BOTTLENECK: Final = Schema(
    required={
        "mh_adapter": rules.flag,
        "output_adapter": rules.flag,
        "reduction_factor": _reduction,
        "non_linearity": _activation,
    },
    optional={
        "original_ln_before": rules.flag,
        "original_ln_after": rules.flag,
        "ln_before": rules.flag,
        "ln_after": rules.flag,
        "is_parallel": rules.flag,
        "scaling": _scaling,
        "residual_before_ln": _kept,
        "adapter_residual_before_ln": rules.flag,
        "cross_adapter": rules.flag,
        "leave_out": _layers,
        "inv_adapter": rules.one_of("nice"),
        "inv_adapter_reduction_factor": _positive,
    },
    defaults={
        "original_ln_after": True,
        "residual_before_ln": True,
        "scaling": 1.0,
        "leave_out": [],
    },
    inert=frozenset(
        {
            "init_weights",
            "init_weights_seed",
            "dropout",
            "stochastic_depth",
            "phm_dim",
            "phm_c_init",
            "phm_init_range",
            "phm_rank",
            "phm_bias",
            "learn_phm",
            "hypercomplex_nonlinearity",
            "shared_phm_rule",
            "factorized_phm_rule",
            "shared_W_phm",
            "factorized_phm_W",
        }
    ),
    refused={
        "use_gating": GATED,
        "phm_layer": (
            "makes a Compacter, whose shared matrices adapters 1.3 loads differently from how it trained them; "
            "train with phm_layer=False"
        ),
    },
)

LORA: Final = Schema(
    required={"r": rules.integer(1, 1 << 20), "alpha": rules.number(1e6)},
    optional={
        "selfattn_lora": rules.flag,
        "intermediate_lora": rules.flag,
        "output_lora": rules.flag,
        "leave_out": _layers,
        "attn_matrices": _projections,
        "composition_mode": rules.one_of("add", "scale"),
        "use_dora": rules.flag,
    },
    defaults={"selfattn_lora": True, "attn_matrices": ["q", "v"], "composition_mode": "add", "leave_out": []},
    inert=frozenset({"dropout", "init_weights", "init_weights_seed", "dtype"}),
    refused={
        "use_gating": GATED,
        **dict.fromkeys(
            ("vera_d", "vera_b"),
            "makes a VeRA, whose random matrices adapters does not save; train it with peft, or train a LoRA",
        ),
    },
)

REFT: Final = Schema(
    required={
        "layers": _acting_layers,
        "prefix_positions": rules.integer(0, 1 << 20),
        "suffix_positions": rules.integer(0, 1 << 20),
        "r": rules.integer(1, 1 << 20),
        "orthogonality": rules.flag,
    },
    optional={
        "tied_weights": rules.flag,
        "non_linearity": _activation,
        "output_reft": rules.flag,
        # What tells DiReFT from NoReFT. The library never saves it, and reads every file as if it were true.
        "subtract_projection": rules.flag,
    },
    defaults={"output_reft": True, "subtract_projection": True},
    inert=frozenset({"dropout", "dtype", "init_weights_seed"}),
)

PROMPT: Final = Schema(
    required={"prompt_length": rules.integer(1, 1 << 20)},
    optional={"combine": rules.one_of("prefix")},
    defaults={"combine": "prefix"},
    inert=frozenset({"prompt_init", "prompt_init_text", "random_uniform_scale", "init_weights_seed"}),
)

PREFIX: Final = Schema(
    required={"prefix_length": rules.integer(1, 1 << 20)},
    optional={
        "flat": rules.flag,
        "bottleneck_size": rules.integer(1, 1 << 20),
        "non_linearity": _activation,
        "encoder_prefix": rules.flag,
        "cross_prefix": rules.flag,
        "leave_out": _layers,
    },
    defaults={
        "flat": False,
        "bottleneck_size": 512,
        "non_linearity": "tanh",
        "encoder_prefix": True,
        "cross_prefix": True,
        "leave_out": [],
    },
    inert=frozenset({"dropout", "shared_gating", "init_weights_seed"}),
    refused={"use_gating": GATED},
)
