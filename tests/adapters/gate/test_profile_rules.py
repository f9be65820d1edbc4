"""`peft_serve.json`: what is taken, and what is refused by field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from peft_serve.adapters.profile import PARAMETERS, parse_profile
from peft_serve.adapters.records import Profile
from peft_serve.errors import AdapterInvalid, MalformedUpload

GOOD = {
    "template": "Tweet: {text} Label:",
    "choices": {"yes": " complaint", "no": " no complaint"},
    "parameters": {"max_new_tokens": 5, "temperature": 0.5, "stop": ["\n"], "do_sample": True, "seed": 0},
    "labels": ["yes", "no"],
}


def test_all_fields() -> None:
    profile = parse_profile(json.dumps(GOOD).encode())
    assert profile == Profile(
        template=GOOD["template"],
        choices=GOOD["choices"],
        parameters=GOOD["parameters"],
        labels=("yes", "no"),
    )


def test_every_field_may_be_absent_or_null() -> None:
    assert parse_profile(b"{}") == Profile()
    assert parse_profile(json.dumps(dict.fromkeys(GOOD)).encode()) == Profile()


def test_edges_of_the_ranges_are_in() -> None:
    edges = {"temperature": 0, "top_p": 1, "min_p": 0, "frequency_penalty": -2, "seed": (1 << 63) - 1, "top_k": 0}
    assert parse_profile(json.dumps({"parameters": edges}).encode()).parameters == edges


BAD: list[tuple[str, Any]] = [
    ("template", ""),
    ("template", "no place"),
    ("template", "{text} {text}"),
    ("template", "{text} {0}"),
    ("template", "{text!r}"),
    ("template", "{{text}}"),
    ("template", "{text.__class__} {text}"),
    ("template", 3),
    ("choices", {}),
    ("choices", {"only": "one"}),
    ("choices", {"a": "", "b": "x"}),
    ("choices", {"": "y", "b": "x"}),
    ("choices", {"a": 1, "b": "x"}),
    ("choices", ["a", "b"]),
    ("choices", {str(i): "x" for i in range(257)}),
    ("parameters", []),
    ("labels", []),
    ("labels", ["a", "a"]),
    ("labels", ["a", 1]),
    ("labels", [["a"], ["a"]]),
    ("labels", "ab"),
    ("unknown", 1),
    ("unknown", None),
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=range(len(BAD)))
def test_field_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(AdapterInvalid) as refused:
        parse_profile(json.dumps({**GOOD, field: value}).encode())
    assert [error.path for error in refused.value.errors] == [f"peft_serve.json: {field}"]


OUT_OF_RANGE: list[tuple[str, Any]] = [
    ("max_new_tokens", 0),
    ("max_new_tokens", 1.5),
    ("max_new_tokens", True),
    ("min_new_tokens", -1),
    ("do_sample", 1),
    ("temperature", -0.1),
    ("temperature", "1"),
    ("top_k", -1),
    ("top_p", 0),
    ("top_p", 1.01),
    ("min_p", 2),
    ("typical_p", 0),
    ("repetition_penalty", 0),
    ("frequency_penalty", 3),
    ("presence_penalty", -2.5),
    ("seed", -1),
    ("seed", 1 << 63),
    ("stop", "x"),
    ("stop", [""]),
    ("stop", ["x"] * 17),
    ("ignore_eos", "yes"),
    ("return_full_text", None),
    ("task_id", -1),
    ("model", "other"),
    ("adapter", "other"),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE, ids=range(len(OUT_OF_RANGE)))
def test_parameter_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(AdapterInvalid) as refused:
        parse_profile(json.dumps({"parameters": {name: value}}).encode())
    assert refused.value.errors[0].path == f"peft_serve.json: parameters.{name}"


def test_every_parameter_has_a_case() -> None:
    assert set(PARAMETERS) <= {name for name, _ in OUT_OF_RANGE}


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"labels": ["a"], "labels": ["b"]}', b'{"parameters": {"top_p": NaN}}', b" " * 20_000 + b"{}"],
)
def test_unreadable(content: bytes) -> None:
    with pytest.raises(MalformedUpload):
        parse_profile(content)
