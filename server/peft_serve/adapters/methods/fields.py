"""Rules of config fields that many methods have, and the one way in which a layout refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.config_schema import Rule
from peft_serve.adapters.records import CONFIG_FILE
from peft_serve.errors import AdapterInvalid, Refusal

TARGETS: Final[Mapping[str, Rule]] = {"target_modules": rules.names_or_text}
LAYERS: Final[Mapping[str, Rule]] = {
    "layers_to_transform": rules.layer_numbers,
    "layers_pattern": rules.names_or_text,
}
TARGETING: Final[Mapping[str, Rule]] = {**TARGETS, "exclude_modules": rules.names_or_text, **LAYERS}
"""Where a method acts, for methods with all the fields that can say so."""

RANK: Final = rules.integer(1, 1 << 20)
COUNT: Final = rules.integer(1, 1 << 40)
SEED: Final = rules.integer(-(1 << 63), (1 << 64) - 1)  # what a generator of torch takes


def tuned_biases(method: str) -> Rule:
    """The field `bias`: none, all, or those of the sites where the method acts."""
    return rules.one_of("none", "all", f"{method}_only")


def positive(max_value: float) -> Rule:
    """A number above zero."""

    def rule(value: object) -> str | None:
        fine = type(value) in (int, float) and 0 < value <= max_value  # type: ignore[operator]
        return None if fine else f"a number above 0 and at most {max_value:g}"

    return rule


def disagreement(place: str, reason: str) -> AdapterInvalid:
    """A refusal of what a config, the base and the tensors say together; `place` is a path or a tensor's name."""
    return AdapterInvalid([Refusal(place, reason)])


def contradiction(field: str, reason: str) -> AdapterInvalid:
    """A refusal of a config field."""
    return AdapterInvalid([Refusal(f"{CONFIG_FILE}: {field}", reason)])
