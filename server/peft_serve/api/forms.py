"""The form that an answer is asked to have, whichever client's words it is asked in. Pure functions.

Every way of asking comes to one `Form`: a grammar, and the field to blame it on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft_serve.api.bodies import OpenAIBody, Parameters
from peft_serve.api.form_bodies import GrammarField, ResponseFormat, StructuredOutputs
from peft_serve.errors import InvalidParameter
from peft_serve.grammars.grammar import (
    Grammar,
    GrammarRefused,
    of_choice,
    of_json_object,
    of_json_schema,
    of_regex,
    of_rules,
)


@dataclass(frozen=True, slots=True)
class Form:
    """A grammar, and where in the body it was asked for."""

    grammar: Grammar
    place: str


_Reading = tuple[str, Callable[[], Grammar | None]]
"""A field of a body that was sent, and how its grammar is made; None: it asks for nothing."""


def form_of_parameters(parameters: Parameters) -> Form | None:
    """What native parameters (TGI's and LoRAX' too) ask for; raises InvalidParameter."""
    p = parameters
    readings: list[_Reading] = []
    if p.grammar is not None:
        readings.append(("grammar.value", lambda: _of_field(p.grammar)))
    if p.regex is not None:
        readings.append(("regex", lambda: of_regex(p.regex or "")))
    if p.json_schema is not None:
        readings.append(("json_schema", lambda: of_json_schema(p.json_schema)))
    if p.response_format is not None:
        readings.append(("response_format", lambda: _of_response_format(p.response_format)))
    return _only(readings, path="parameters.")


def form_of_openai(body: OpenAIBody) -> Form | None:
    """What a completion or a chat asks for; raises InvalidParameter."""
    readings: list[_Reading] = []
    if body.response_format is not None:
        readings.append(("response_format", lambda: _of_response_format(body.response_format)))
    if body.guided_json is not None:
        readings.append(("guided_json", lambda: of_json_schema(body.guided_json)))
    if body.guided_regex is not None:
        readings.append(("guided_regex", lambda: of_regex(body.guided_regex or "")))
    if body.guided_choice is not None:
        readings.append(("guided_choice", lambda: of_choice(body.guided_choice or ())))
    if body.guided_grammar is not None:
        readings.append(("guided_grammar", lambda: of_rules(body.guided_grammar or "")))
    if body.structured_outputs is not None:
        readings.append(("structured_outputs", lambda: _of_structured(body.structured_outputs)))
    return _only(readings)


def formed(place: str, make: Callable[[], Grammar]) -> Form:
    """The grammar that `make` gives, asked for at `place`; raises InvalidParameter."""
    try:
        return Form(make(), place)
    except GrammarRefused as error:
        raise refused(place, error) from error


def refused(place: str, error: GrammarRefused) -> InvalidParameter:
    """Why there is no such grammar, in the caller's words."""
    return InvalidParameter(f"{place}: {error}", param=field_of(place))


def field_of(place: str) -> str:
    """The field of the body, or of its parameters, that a place is in."""
    return place.removeprefix("parameters.").split(".")[0]


def _only(readings: list[_Reading], path: str = "") -> Form | None:
    found: list[Form] = []
    for name, read in readings:
        place = path + name
        try:
            grammar = read()
        except GrammarRefused as error:
            raise refused(place, error) from error
        if grammar is not None:
            found.append(Form(grammar, place))
    if len(found) > 1:
        raise InvalidParameter(
            f"{found[1].place}: {found[0].place} says already what the answer is to look like; send one of them",
            param=field_of(found[1].place),
        )
    return found[0] if found else None


def _of_field(field: GrammarField | None) -> Grammar | None:
    if field is None:
        return None
    if field.type == "regex":
        if not isinstance(field.value, str):
            raise GrammarRefused("a pattern is a string")
        return of_regex(field.value)
    return of_json_schema(_inner_schema(field.value) if field.type == "json_schema" else field.value)


def _inner_schema(value: Any) -> Any:
    """The schema of one with a name; a bare one is taken as it is."""
    named = isinstance(value, dict) and isinstance(value.get("schema"), dict)
    return value["schema"] if named else value


def _of_response_format(wanted: ResponseFormat | None) -> Grammar | None:
    if wanted is None or wanted.type == "text":
        return None
    beside = wanted.schema_ if wanted.schema_ is not None else wanted.value
    if wanted.type == "json_object":
        return of_json_object() if beside is None else of_json_schema(beside)
    schema = beside if wanted.json_schema is None else wanted.json_schema.schema_
    if schema is None:
        raise GrammarRefused("type json_schema needs a schema, in json_schema.schema")
    return of_json_schema(schema)


def _of_structured(wanted: StructuredOutputs | None) -> Grammar | None:
    if wanted is None:
        return None
    asked = {
        "json": wanted.json_,
        "regex": wanted.regex,
        "choice": wanted.choice,
        "grammar": wanted.grammar,
        "json_object": wanted.json_object or None,
    }
    said = [name for name, value in asked.items() if value is not None]
    if len(said) > 1:
        raise GrammarRefused(f"{said[0]} and {said[1]} are two forms of one answer; send one of them")
    if wanted.json_ is not None:
        return of_json_schema(wanted.json_)
    if wanted.regex is not None:
        return of_regex(wanted.regex)
    if wanted.choice is not None:
        return of_choice(wanted.choice)
    if wanted.grammar is not None:
        return of_rules(wanted.grammar)
    return of_json_object() if wanted.json_object else None
