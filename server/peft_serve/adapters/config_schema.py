"""`adapter_config.json` against a schema: every field is read, inert, or refused by name.

read     used by the compiler; type and range are checked
inert    says something about training or bookkeeping; ignored whatever its value
refused  changes what the adapter computes in a way that is not served; must be empty
unknown  any other field; must be empty, because ignoring it could change what the adapter computes

Regular expressions of a config are never run. Knows no tensors and no base.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from peft_serve.adapters.records import CONFIG_FILE
from peft_serve.adapters.verdict import Verdict, quoted

Rule = Callable[[object], str | None]
"""None when the value is fine, else what it must be."""

MAX_NAMES = 8192
MAX_SAVED_MODULES = 256
MAX_PATTERN_KEYS = 4096
MAX_BASE_NAME = 1024
LITERAL = re.compile(r"\^?[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*\$?")
ANYWHERE = r".*\."
"""peft writes this in front of a name of its own accord (the experts of a mixture, for example): in any module."""

TASK_TYPES: Final = (
    "CAUSAL_LM",
    "SEQ_2_SEQ_LM",
    "SEQ_CLS",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)


def is_empty(value: object) -> bool:
    """Whether a field says nothing: null, false, or an empty text, list or object."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def integer(low: int, high: int) -> Rule:
    def rule(value: object) -> str | None:
        return None if type(value) is int and low <= value <= high else f"an integer from {low} to {high}"

    return rule


def number(max_abs: float) -> Rule:
    def rule(value: object) -> str | None:
        fine = type(value) in (int, float) and abs(value) <= max_abs  # type: ignore[arg-type]
        return None if fine else f"a number of at most {max_abs:g} in magnitude"

    return rule


def flag(value: object) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def text(value: object) -> str | None:
    return None if isinstance(value, str) else "a string"


def short_text(max_chars: int) -> Rule:
    def rule(value: object) -> str | None:
        fine = isinstance(value, str) and len(value) <= max_chars
        return None if fine else f"a string of at most {max_chars} characters"

    return rule


def one_of(*allowed: str) -> Rule:
    def rule(value: object) -> str | None:
        return None if isinstance(value, str) and value in allowed else "one of " + ", ".join(allowed)

    return rule


def names(max_len: int = MAX_NAMES) -> Rule:
    def rule(value: object) -> str | None:
        fine = isinstance(value, list) and len(value) <= max_len and all(isinstance(v, str) and v for v in value)
        return None if fine else f"a list of at most {max_len} module names"

    return rule


def names_or_text(value: object) -> str | None:
    """A list of names, or a string that may be a regular expression and is therefore not looked into."""
    if isinstance(value, str) or names()(value) is None:
        return None
    return "a list of module names, or a string"


def layer_numbers(value: object) -> str | None:
    numbers = value if isinstance(value, list) else [value]
    fine = all(type(n) is int and 0 <= n < 1 << 16 for n in numbers)
    return None if fine else "a layer number, or a list of them"


def pattern(values: Rule, *, max_keys: int = MAX_PATTERN_KEYS) -> Rule:
    """An object from literal module names to values; peft reads the keys as regular expressions, we do not."""

    def rule(value: object) -> str | None:
        if not isinstance(value, dict) or len(value) > max_keys:
            return f"an object from at most {max_keys} module names to values"
        for key, item in value.items():
            if not LITERAL.fullmatch(key.removeprefix(ANYWHERE)):
                return (
                    f"keyed by plain dotted module names, not by the regular expression {quoted(key)} "
                    "(write out each module's name)"
                )
            expected = values(item)
            if expected is not None:
                return f"{expected} for {quoted(key)}"
        return None

    return rule


@dataclass(frozen=True, slots=True)
class Config:
    """A config whose read fields passed their rules; absent and null fields give the default."""

    fields: Mapping[str, Any]

    def flag(self, name: str) -> bool:
        return bool(self.fields.get(name))

    def integer(self, name: str, default: int = 0) -> int:
        value = self.fields.get(name)
        return default if value is None else int(value)

    def number(self, name: str) -> float:
        return float(self.fields[name])

    def text(self, name: str, default: str = "") -> str:
        value = self.fields.get(name)
        return value if isinstance(value, str) else default

    def names(self, name: str) -> tuple[str, ...]:
        value = self.fields.get(name)
        return tuple(value) if isinstance(value, list) else ()

    def raw(self, name: str) -> object:
        return self.fields.get(name)

    def for_site(self, name: str, path: str) -> float | None:
        """The value of the first key of the pattern `name` that the site's path is or ends with."""
        entries: Mapping[str, float] = self.fields.get(name) or {}
        if not entries:
            return None
        parts = path.split(".")
        keys = {".".join(parts[i:]) for i in range(len(parts))}
        wanted = keys | {f"{key}$" for key in keys} | {f"^{path}", f"^{path}$"}
        inner = keys - {path}
        wanted |= {f"{ANYWHERE}{key}" for key in inner} | {f"{ANYWHERE}{key}$" for key in inner}
        found = wanted & entries.keys()
        return next((value for key, value in entries.items() if key in found), None) if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigSchema:
    """The fields of one peft type."""

    required: Mapping[str, Rule] = field(default_factory=dict)
    optional: Mapping[str, Rule] = field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)  # field -> why, and the way out

    def check(self, fields: Mapping[str, Any], verdict: Verdict) -> Config:
        """Refuse in `verdict` every field that breaks its rule; the result is for use only when none did."""
        for name, rule in self.required.items():
            self._apply(name, rule, fields.get(name), verdict)
        for name, value in fields.items():
            if name in self.required or name in self.inert or name in INERT or name == "peft_type":
                continue
            rule_or_none = self.optional.get(name) or OPTIONAL.get(name)
            if rule_or_none is not None:
                if value is not None:
                    self._apply(name, rule_or_none, value, verdict)
            elif not is_empty(value):
                reason = self.refused.get(name) or REFUSED.get(name)
                verdict.refuse(_place(name), reason or UNKNOWN)
        return Config(fields)

    def _apply(self, name: str, rule: Rule, value: object, verdict: Verdict) -> None:
        expected = rule(value)
        if expected is not None:
            verdict.refuse(_place(name), f"is {quoted(value)}; it must be {expected}")


def _place(name: str) -> str:
    return f"{CONFIG_FILE}: {name[:64]}"


UNKNOWN: Final = (
    "is a field that this server does not know and will not ignore; "
    "remove it if the adapter works without, or set it to null"
)

OPTIONAL: Final[Mapping[str, Rule]] = {
    "task_type": one_of(*TASK_TYPES),
    "base_model_name_or_path": short_text(MAX_BASE_NAME),  # told in every listing
    "peft_version": short_text(MAX_BASE_NAME),
    "modules_to_save": names(MAX_SAVED_MODULES),
}

INERT: Final = frozenset({"inference_mode", "revision", "auto_mapping", "runtime_config"})

REFUSED: Final[Mapping[str, str]] = {
    "trainable_token_indices": "trained token rows beside another method are served with LORA only; use that, or "
    "modules_to_save for the embedding",
    "target_parameters": "adapters on bare parameters are served with LORA only; use that, or target modules instead",
    **dict.fromkeys(
        ("arrow_config", "use_bdlora", "use_qalora", "kasa_config", "alora_invocation_tokens"),
        "is a variant that peft defines for LORA only; train that, or leave it out",
    ),
    "layer_replication": "makes the base model deeper, which would change it for everyone; train without it",
}
"""Every type's fields; a method's own schema adds to them."""
