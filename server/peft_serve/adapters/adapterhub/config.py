"""AdapterHub's `adapter_config.json`: which methods it describes, every field read, inert or refused by name.

The file holds `config`, the fields of one method or the members of a union, beside facts about the model it was
trained on. `architecture` names the method; a bottleneck has none. Knows no tensors and no base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.config_schema import Config, Rule, is_empty
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.records import CONFIG_FILE
from peft_serve.adapters.strict_json import parse_object
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


def is_adapterhub(content: bytes, limits: GateLimits) -> bool:
    """Whether a config file is AdapterHub's and not peft's; raises `MalformedUpload` when it cannot be read."""
    fields = parse_object(content, name=CONFIG_FILE, max_bytes=limits.max_config_bytes)
    return "peft_type" not in fields and "config" in fields


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

REFUSED: Final[Mapping[str, str]] = {
    "prefix_tuning": (
        "is prefix tuning, whose tokens AdapterHub does not count as positions, and which it cannot save as "
        "safetensors; train it with peft, or train a bottleneck"
    ),
    "prompt_tuning": (
        "is prompt tuning, whose prompt AdapterHub puts behind the embeddings' norm, without positions; train it "
        "with peft"
    ),
    "reft": (
        "is ReFT, which changes the last positions of a sequence and so would depend on the tokens yet to come; "
        "train a bottleneck or a LoRA"
    ),
    "mtl_lora": "shares its matrices among several tasks; train a LoRA for each",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HubConfig:
    """What a config file says, once the verdict has settled."""

    name: str  # the adapter's name, which its tensors carry
    model_type: str
    model_class: str
    model_name: str
    hidden_size: int | None
    bottleneck: Config | None
    lora: Config | None

    @property
    def method(self) -> str:
        """What people call it."""
        if self.bottleneck is not None and self.lora is not None:
            return "ADAPTERHUB_UNION"
        if self.lora is None:
            return "ADAPTERHUB_BOTTLENECK"
        if self.lora.text("composition_mode") == "scale":
            return "ADAPTERHUB_IA3"
        return "ADAPTERHUB_DORA" if self.lora.flag("use_dora") else "ADAPTERHUB_LORA"


def read_config(content: bytes, limits: GateLimits, verdict: Verdict) -> HubConfig:
    """The config; raises `MalformedUpload`, and `AdapterInvalid` when nothing can be made of it."""
    fields = parse_object(content, name=CONFIG_FILE, max_bytes=limits.max_config_bytes)
    for name in ("name", "model_type"):
        if not isinstance(fields.get(name), str) or not fields[name]:
            verdict.refuse(f"{CONFIG_FILE}: {name}", "must be a string; upload the file as adapters wrote it")
    members = _members(fields["config"], verdict)
    verdict.settle()
    parts = {method: _checked(method, member, fields, verdict) for method, member in members.items()}
    verdict.settle()
    hidden_size = fields.get("hidden_size")
    return HubConfig(
        name=fields["name"],
        model_type=fields["model_type"],
        model_class=_text(fields.get("model_class")),
        model_name=_text(fields.get("model_name")),
        hidden_size=hidden_size if type(hidden_size) is int else None,
        bottleneck=parts.get("bottleneck"),
        lora=parts.get("lora"),
    )


def _members(config: object, verdict: Verdict) -> dict[str, Mapping[str, Any]]:
    """The fields of each method, by `bottleneck` and `lora`."""
    if not isinstance(config, dict):
        reason = "must be an object; a config by name alone is of an old library: load and save it with adapters 1.3"
        verdict.refuse(f"{CONFIG_FILE}: config", reason)
        return {}
    given = config.get("configs") if config.get("architecture") == "union" else [config]
    members: dict[str, Mapping[str, Any]] = {}
    for member in given if isinstance(given, list) else [given]:
        method = _method_of(member, verdict)
        if method in members:
            reason = "names one method twice; two places of one kind are not served: save two adapters"
            verdict.refuse(f"{CONFIG_FILE}: config.configs", reason)
        elif method is not None and isinstance(member, dict):
            members[method] = member
    if not given:
        verdict.refuse(f"{CONFIG_FILE}: config", "describes no method; upload the file as adapters wrote it")
    return members


def _method_of(member: object, verdict: Verdict) -> str | None:
    if not isinstance(member, dict):
        verdict.refuse(f"{CONFIG_FILE}: config.configs", "must be a list of objects")
        return None
    architecture = member.get("architecture")
    if architecture is None:
        return "bottleneck"
    if architecture == "lora":
        return "lora"
    known = REFUSED.get(architecture) if isinstance(architecture, str) else None
    reason = known or f"is {quoted(architecture)}; served are bottlenecks (no architecture), lora, and unions of them"
    verdict.refuse(place_of("architecture"), reason)
    return None


def _checked(method: str, member: Mapping[str, Any], fields: Mapping[str, Any], verdict: Verdict) -> Config:
    if method == "bottleneck":
        return _bottleneck(BOTTLENECK.check(member, verdict), verdict)
    config = LORA.check(member, verdict)
    if config.text("composition_mode") == "scale" and (config.raw("r") != 1 or config.flag("use_dora")):
        verdict.refuse(place_of("composition_mode"), "is scale, which needs r = 1 and no use_dora")
    if _has_faulty_scale(_text(fields.get("version"))):
        return Config({**config.fields, "alpha": config.raw("r")})
    return config


def _bottleneck(config: Config, verdict: Verdict) -> Config:
    if config.raw("inv_adapter") is not None and config.raw("inv_adapter_reduction_factor") is None:
        verdict.refuse(place_of("inv_adapter_reduction_factor"), "is missing and inv_adapter is given")
    return config


def _has_faulty_scale(version: str) -> bool:
    """Whether the LoRA was trained by a library that scaled by one whatever alpha said: `adapters` before 1.1."""
    found = re.fullmatch(r"adapters\.(\d{1,4})\.(\d{1,4})(\..*)?", version)
    return found is not None and (int(found[1]), int(found[2])) < (1, 1)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
