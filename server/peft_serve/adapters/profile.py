"""`peft_serve.json`: how an adapter wants to be asked; strict, because it becomes part of every request.

Knows nothing of the tensors beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from peft_serve.adapters.config_schema import Rule, flag, integer
from peft_serve.adapters.records import PROFILE_FILE, Profile
from peft_serve.adapters.strict_json import parse_object
from peft_serve.adapters.verdict import Verdict, quoted

MAX_BYTES: Final = 16 * 1024
PLACE: Final = "{text}"
MIN_CHOICES: Final = 2
MAX_CHOICES: Final = 256
MAX_STOPS: Final = 16
MAX_EXAMPLES: Final = 16


def _between(low: float, high: float, *, above: bool = False) -> Rule:
    """A number in the range; `above` leaves out the lower end."""

    def rule(value: object) -> str | None:
        fine = type(value) in (int, float) and low <= value <= high and not (above and value == low)  # type: ignore[operator]
        return None if fine else f"a number {'above' if above else 'from'} {low:g}{' and' if above else ''} to {high:g}"

    return rule


def _temperature(value: object) -> str | None:
    fine = type(value) in (int, float) and (value == 0 or 0.001 <= value <= 100)  # type: ignore[operator]
    return None if fine else "0 (greedy), or a number from 0.001 to 100"


def _stops(value: object) -> str | None:
    fine = isinstance(value, list) and len(value) <= MAX_STOPS and all(isinstance(s, str) and s for s in value)
    return None if fine else f"a list of at most {MAX_STOPS} non-empty strings"


FIELDS: Final = frozenset({"template", "choices", "parameters", "labels", "examples"})
PARAMETERS: Final[Mapping[str, Rule]] = {
    "max_new_tokens": integer(1, 1 << 20),
    "min_new_tokens": integer(0, 1 << 20),
    "do_sample": flag,
    "temperature": _temperature,
    "top_k": integer(0, 1 << 20),
    "top_p": _between(0, 1, above=True),
    "min_p": _between(0, 1),
    "typical_p": _between(0, 1, above=True),
    "repetition_penalty": _between(0.01, 100),
    "frequency_penalty": _between(-2, 2),
    "presence_penalty": _between(-2, 2),
    "seed": integer(0, (1 << 63) - 1),
    "stop": _stops,
    "ignore_eos": flag,
    "return_full_text": flag,
    "task_id": integer(0, 1 << 20),
}


def parse_profile(content: bytes, *, max_new_tokens: int = 1 << 20) -> Profile:
    """What the file says; `max_new_tokens` is the most that its parameters may ask for.

    Raises `MalformedUpload` when it cannot be read and `AdapterInvalid` when a field breaks its rule.
    """
    fields = parse_object(content, name=PROFILE_FILE, max_bytes=MAX_BYTES, max_depth=4)
    verdict = Verdict()
    for name in fields.keys() - FIELDS:
        _refuse(verdict, name, f"is not a field of a profile; they are {', '.join(sorted(FIELDS))}")
    _check_template(fields.get("template"), verdict)
    _check_choices(fields.get("choices"), verdict)
    _check_parameters(fields.get("parameters"), verdict, max_new_tokens)
    _check_labels(fields.get("labels"), verdict)
    _check_examples(fields.get("examples"), verdict)
    verdict.settle()
    labels = fields.get("labels")
    return Profile(
        template=fields.get("template"),
        choices=fields.get("choices"),
        parameters=fields.get("parameters") or {},
        labels=None if labels is None else tuple(labels),
        examples=tuple(fields.get("examples") or ()),
    )


def _refuse(verdict: Verdict, field: str, reason: str) -> None:
    verdict.refuse(f"{PROFILE_FILE}: {field[:64]}", reason)


def _check_template(template: object, verdict: Verdict) -> None:
    if template is None:
        return
    if not isinstance(template, str) or template.count(PLACE) != 1:
        _refuse(verdict, "template", "must be a string that holds {text} exactly once")
    elif {"{", "}"} & set(template.replace(PLACE, "")):
        _refuse(verdict, "template", "holds braces other than {text}; templates have this one place and no escapes")


def _check_choices(choices: object, verdict: Verdict) -> None:
    if choices is None:
        return
    if not isinstance(choices, dict) or not MIN_CHOICES <= len(choices) <= MAX_CHOICES:
        _refuse(verdict, "choices", f"must be an object of {MIN_CHOICES} to {MAX_CHOICES} labels with their words")
        return
    for label, words in choices.items():
        if not label or not isinstance(words, str) or not words:
            _refuse(verdict, "choices", f"label {quoted(label)} and its words must be non-empty strings")


def _check_parameters(parameters: Any, verdict: Verdict, max_new_tokens: int) -> None:
    if parameters is None:
        return
    if not isinstance(parameters, dict):
        _refuse(verdict, "parameters", "must be an object of request parameters")
        return
    asked = parameters.get("max_new_tokens")
    if type(asked) is int and asked > max_new_tokens:
        _refuse(verdict, "parameters.max_new_tokens", f"is {asked}; this server gives at most {max_new_tokens}")
    for name, value in parameters.items():
        rule = PARAMETERS.get(name)
        if rule is None:
            _refuse(verdict, f"parameters.{name}", f"is not a request parameter; they are {', '.join(PARAMETERS)}")
            continue
        expected = rule(value)
        if expected is not None:
            _refuse(verdict, f"parameters.{name}", f"is {quoted(value)}; it must be {expected}")


def _check_labels(labels: object, verdict: Verdict) -> None:
    if labels is None:
        return
    fine = isinstance(labels, list) and labels and all(isinstance(label, str) and label for label in labels)
    if not fine or len(set(labels)) != len(labels):  # type: ignore[call-overload, arg-type]
        _refuse(verdict, "labels", "must be a list of distinct non-empty strings")


def _check_examples(examples: object, verdict: Verdict) -> None:
    if examples is None:
        return
    fine = (
        isinstance(examples, list) and len(examples) <= MAX_EXAMPLES and all(isinstance(e, str) and e for e in examples)
    )
    if not fine:
        _refuse(verdict, "examples", f"must be a list of at most {MAX_EXAMPLES} non-empty strings")
