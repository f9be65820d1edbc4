"""Answers of a given form, in every client's words."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient, constants

from tests.api.api_fakes import World

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["complaint", "praise"]}, "stars": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["kind", "stars"],
    "additionalProperties": False,
}
NAMED = {"name": "review", "schema": SCHEMA, "strict": True}


def is_review(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"kind", "stars"} and value["kind"] in ("complaint", "praise") and 1 <= value["stars"] <= 5


def is_phone(text: str) -> bool:
    return re.fullmatch(r"\d{3}-\d{4}", text) is not None


NATIVE = [
    ({"json_schema": SCHEMA}, is_review),
    ({"regex": r"\d{3}-\d{4}"}, is_phone),
    ({"grammar": {"type": "json", "value": SCHEMA}}, is_review),
    ({"grammar": {"type": "json", "value": json.dumps(SCHEMA)}}, is_review),
    ({"grammar": {"type": "json_schema", "value": NAMED}}, is_review),
    ({"grammar": {"type": "regex", "value": r"\d{3}-\d{4}"}}, is_phone),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, is_review),
    ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, is_review),
]
OPENAI = [
    ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, is_review),
    ({"response_format": {"type": "json_object", "value": SCHEMA}}, is_review),
    ({"guided_json": SCHEMA}, is_review),
    ({"guided_json": json.dumps(SCHEMA), "guided_decoding_backend": "auto"}, is_review),
    ({"guided_regex": r"\d{3}-\d{4}"}, is_phone),
    ({"guided_choice": ["012-3456"]}, is_phone),
    ({"guided_grammar": 'root ::= d d d "-" d d d d\nd ::= [0-9]'}, is_phone),
    ({"structured_outputs": {"json": SCHEMA}}, is_review),
    ({"structured_outputs": {"regex": r"\d{3}-\d{4}"}}, is_phone),
    ({"structured_outputs": {"choice": ["111-2222", "333-4444"]}}, is_phone),
    ({"structured_outputs": {"grammar": "start: /[0-9]{3}-[0-9]{4}/"}}, is_phone),
]


@pytest.mark.parametrize(("said", "fits"), NATIVE)
async def test_native_parameters(client: httpx.AsyncClient, said: dict[str, Any], fits: Any) -> None:
    parameters = {"max_new_tokens": 100, "details": True, **said}
    answer = await client.post("/generate?adapter=plain", json={"inputs": "hello", "parameters": parameters})
    assert answer.status_code == 200, answer.text
    assert fits(answer.json()["generated_text"])
    assert answer.json()["details"]["finish_reason"] == "eos_token"


@pytest.mark.parametrize(("said", "fits"), OPENAI)
async def test_openais_and_vllms_fields(client: httpx.AsyncClient, said: dict[str, Any], fits: Any) -> None:
    body = {"max_tokens": 100, **said}
    answer = await client.post("/v1/completions", json={"prompt": ["one", "two"], "n": 2, "seed": 3, **body})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == 4
    assert all(fits(choice["text"]) for choice in answer.json()["choices"])
    messages = [{"role": "user", "content": "hello"}]
    chat = await client.post("/v1/chat/completions", json={"messages": messages, **body})
    assert fits(chat.json()["choices"][0]["message"]["content"])
    assert chat.json()["choices"][0]["finish_reason"] == "stop"


async def test_any_json_object_and_plain_text(client: httpx.AsyncClient, world: World) -> None:
    body = {"prompt": "hello", "max_tokens": 5}
    for said in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        answer = await client.post("/v1/completions", json=body | said)
        assert answer.json()["choices"][0]["text"].startswith("{")
        assert answer.json()["choices"][0]["finish_reason"] in ("length", "stop")
        assert world.engine.seen[-1].constraint is not None
    for free in ({"response_format": {"type": "text"}}, {"structured_outputs": {}}, {"guided_json": None}):
        assert (await client.post("/v1/completions", json=body | free)).status_code == 200
        assert world.engine.seen[-1].constraint is None


async def test_a_stream_is_held_to_the_form_too(client: httpx.AsyncClient) -> None:
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 100, "json_schema": SCHEMA}}
    stream = await client.post("/generate_stream", json=body)
    events = [json.loads(line.removeprefix("data:")) for line in stream.text.split("\n\n") if line.startswith("data:")]
    assert is_review(events[-1]["generated_text"])
    assert "".join(e["token"]["text"] for e in events if not e["token"]["special"]) == events[-1]["generated_text"]


@pytest.mark.parametrize(
    ("said", "param", "reason"),
    [
        ({"regex": "(a"}, "regex", "parameters.regex: unclosed group"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "json_schema", "uniqueItems"),
        ({"grammar": {"type": "regex", "value": {"a": 1}}}, "grammar", "a pattern is a string"),
        ({"grammar": {"type": "json", "value": "{"}}, "grammar", "parameters.grammar.value: "),
        ({"grammar": {"type": "xml", "value": "x"}}, "type", "parameters.grammar.type"),
        ({"regex": "a", "json_schema": SCHEMA}, "json_schema", "says already"),
        ({"regex": "a", "num_beams": 2}, "regex", "not with beams"),
        ({"regex": "a", "choices": ["b", "c"]}, "regex", "one of the choices"),
        ({"regex": "a" * 70_000}, "regex", "65536"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs a schema"),
        ({"schema": SCHEMA}, "schema", "json_schema"),
    ],
)
async def test_what_cannot_be_is_refused_with_its_place_and_reason(
    client: httpx.AsyncClient, said: dict[str, Any], param: str, reason: str
) -> None:
    answer = await client.post("/generate", json={"inputs": "hello", "parameters": said})
    assert answer.status_code == 422
    assert answer.json()["param"] == param
    assert reason in answer.json()["detail"]


async def test_openais_clients_get_400(client: httpx.AsyncClient) -> None:
    refused = [
        ({"guided_json": {"type": "foo"}}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": {}}}, "structural_tag"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ]
    for said, param in refused:
        answer = await client.post("/v1/completions", json={"prompt": "x", **said})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


async def test_an_adapter_with_choices_says_how_to_get_a_form(client: httpx.AsyncClient) -> None:
    body = {"inputs": "hello", "parameters": {"regex": "a+b", "max_new_tokens": 50}}
    refused = await client.post("/generate?adapter=complaints", json=body)
    assert "send `choices`: null" in refused.json()["detail"]
    body["parameters"] |= {"choices": None}  # type: ignore[operator]
    answer = await client.post("/generate?adapter=complaints", json=body)
    assert re.fullmatch("a+b?", answer.json()["generated_text"])


async def test_openais_client_reads_its_own_schema_back(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-") as client:
        answer = await client.chat.completions.create(
            model="plain",
            messages=[{"role": "user", "content": "hello"}],
            response_format={"type": "json_schema", "json_schema": NAMED},  # type: ignore[typeddict-item]
            max_tokens=100,
        )
        assert is_review(answer.choices[0].message.content or "")


def test_huggingfaces_client_sends_tgis_grammar(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    client = InferenceClient(f"{url}/?adapter=plain")
    grammar = {"type": "json", "value": SCHEMA}
    answer = client.text_generation("hello", grammar=grammar, max_new_tokens=100)  # type: ignore[arg-type]
    assert is_review(answer)
    details = client.text_generation(
        "hello",
        grammar={"type": "regex", "value": "(yes|no)"},
        max_new_tokens=9,
        details=True,  # type: ignore[arg-type]
    )
    assert details.generated_text in ("yes", "no")
    assert details.details is not None
    assert details.details.finish_reason == "eos_token"
    chat = InferenceClient(base_url=f"{url}/v1").chat_completion(
        [{"role": "user", "content": "hello"}],
        model="plain",
        max_tokens=100,
        response_format={"type": "json_schema", "json_schema": NAMED},  # type: ignore[arg-type]
    )
    assert is_review(chat.choices[0].message.content or "")
