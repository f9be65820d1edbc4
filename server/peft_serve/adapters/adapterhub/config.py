"""AdapterHub's `adapter_config.json`: which methods it describes, every field read, inert or refused by name.

The file holds `config`, the fields of one method or the members of a union, beside facts about the model it was
trained on. `architecture` names the method; a bottleneck has none. Knows no tensors and no base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from peft_serve.adapters.adapterhub.schemas import BOTTLENECK, LORA, PREFIX, PROMPT, REFT, place_of
from peft_serve.adapters.config_schema import MAX_BASE_NAME, Config
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.records import CONFIG_FILE
from peft_serve.adapters.strict_json import parse_object
from peft_serve.adapters.verdict import Verdict, quoted

REFUSED: Final[Mapping[str, str]] = {
    "mtl_lora": "shares its matrices among several tasks; train a LoRA for each",
}


def is_adapterhub(content: bytes, limits: GateLimits) -> bool:
    """Whether a config file is AdapterHub's and not peft's; raises `MalformedUpload` when it cannot be read."""
    fields = parse_object(content, name=CONFIG_FILE, max_bytes=limits.max_config_bytes)
    return "peft_type" not in fields and "config" in fields


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
    prefix: Config | None
    prompt: Config | None
    reft: Config | None

    @property
    def method(self) -> str:
        """What people call it."""
        if sum(part is not None for part in self._parts) > 1:
            return "ADAPTERHUB_UNION"
        if self.prefix is not None:
            return "ADAPTERHUB_PREFIX_TUNING"
        if self.prompt is not None:
            return "ADAPTERHUB_PROMPT_TUNING"
        if self.reft is not None:
            return "ADAPTERHUB_REFT"
        if self.lora is None:
            return "ADAPTERHUB_BOTTLENECK"
        if self.lora.text("composition_mode") == "scale":
            return "ADAPTERHUB_IA3"
        return "ADAPTERHUB_DORA" if self.lora.flag("use_dora") else "ADAPTERHUB_LORA"

    @property
    def _parts(self) -> tuple[Config | None, ...]:
        return self.bottleneck, self.lora, self.prefix, self.prompt, self.reft


def read_config(content: bytes, limits: GateLimits, verdict: Verdict) -> HubConfig:
    """The config; raises `MalformedUpload`, and `AdapterInvalid` when nothing can be made of it."""
    fields = parse_object(content, name=CONFIG_FILE, max_bytes=limits.max_config_bytes)
    for name in ("name", "model_type"):
        if not isinstance(fields.get(name), str) or not fields[name]:
            verdict.refuse(f"{CONFIG_FILE}: {name}", "must be a string; upload the file as adapters wrote it")
    for name in ("name", "model_type", "model_class", "model_name"):
        if len(_text(fields.get(name))) > MAX_BASE_NAME:
            verdict.refuse(f"{CONFIG_FILE}: {name}", f"must be of at most {MAX_BASE_NAME} characters; shorten it")
    members = _members(fields["config"], verdict)
    verdict.settle()
    parts = {method: _checked(method, member, fields, limits, verdict) for method, member in members.items()}
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
        prefix=parts.get("prefix"),
        prompt=parts.get("prompt"),
        reft=parts.get("reft"),
    )


def _members(config: object, verdict: Verdict) -> dict[str, Mapping[str, Any]]:
    """The fields of each method, by `bottleneck`, `lora`, `prefix`, `prompt` and `reft`."""
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
    if architecture in ("lora", "reft"):
        return str(architecture)
    if architecture == "prefix_tuning":
        return "prefix"
    if architecture == "prompt_tuning":
        return "prompt"
    known = REFUSED.get(architecture) if isinstance(architecture, str) else None
    served = "bottlenecks (no architecture), lora, prefix_tuning, prompt_tuning, reft, and unions"
    reason = known or f"is {quoted(architecture)}; served are {served}"
    verdict.refuse(place_of("architecture"), reason)
    return None


def _checked(
    method: str, member: Mapping[str, Any], fields: Mapping[str, Any], limits: GateLimits, verdict: Verdict
) -> Config:
    if method == "bottleneck":
        return _bottleneck(BOTTLENECK.check(member, verdict), verdict)
    if method == "prefix":
        return _in_front(PREFIX.check(member, verdict), "prefix_length", limits, verdict)
    if method == "prompt":
        return _in_front(PROMPT.check(member, verdict), "prompt_length", limits, verdict)
    if method == "reft":
        return _reft(REFT.check(member, verdict), verdict)
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


def _in_front(config: Config, name: str, limits: GateLimits, verdict: Verdict) -> Config:
    length = config.raw(name)
    if type(length) is int and length > limits.max_virtual_tokens:
        verdict.refuse(
            place_of(name),
            f"is {length}; this server was started with --max-virtual-tokens {limits.max_virtual_tokens}; "
            "retrain with fewer or ask the operator",
        )
    return config


def _reft(config: Config, verdict: Verdict) -> Config:
    if config.raw("prefix_positions") == config.raw("suffix_positions") == 0:
        verdict.refuse(place_of("prefix_positions"), "and suffix_positions are 0, so that nothing would change")
    return config


def _has_faulty_scale(version: str) -> bool:
    """Whether the LoRA was trained by a library that scaled by one whatever alpha said: `adapters` before 1.1."""
    found = re.fullmatch(r"adapters\.(\d{1,4})\.(\d{1,4})(\..*)?", version)
    return found is not None and (int(found[1]), int(found[2])) < (1, 1)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
