"""Whatever is sent, no answer is a 5xx, none says more than it should, and nothing is left running."""

from __future__ import annotations

import gc
import json
import resource
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_serve.api import fields
from peft_serve.api.bodies import ChatBody, CompletionBody, Parameters
from peft_serve.api.json_body import parse_object, validated
from peft_serve.api.problems import TGI_PATHS, FieldsInvalid
from peft_serve.api.reading_bodies import ClassifyBody, ClassifyParameters, EmbedBody, EmbeddingsBody
from peft_serve.errors import InvalidParameter
from tests.api.api_fakes import World

VALUES = ["-1", "0", "1", "21", "2147483647", "2147483648", "9223372036854775808", "1e308", "1e400", "NaN", "-Infinity"]
NO_JSON = {"1e400", "NaN", "-Infinity", '"\\ud800"'}  # what refuses these has not come to fields
VALUES += ['"5"', "true", "null", "[]", "{}", '""', '[""]', "[[]]", "0.5", '"\\ud800"', '{"a": 1}', "1e-320", "-0.0"]


def named(model: type[Any], rules: fields.FieldRules) -> list[str]:
    return [*model.model_fields, *rules.refused, *sorted(rules.ignored), "never_heard_of"]


FAMILIES = [
    (
        "/generate",
        '{{"inputs": "x", "parameters": {{"max_new_tokens": 2, "{}": {}}}}}',
        named(Parameters, fields.PARAMETERS),
    ),
    (
        "/",
        '{{"inputs": "x", "{}": {}}}',
        ["inputs", "parameters", "stream", "adapter", "adapter_id", "model", "options"],
    ),
    ("/v1/completions", '{{"prompt": "x", "{}": {}}}', named(CompletionBody, fields.COMPLETIONS)),
    (
        "/v1/chat/completions",
        '{{"messages": [{{"role": "user", "content": "x"}}], "{}": {}}}',
        named(ChatBody, fields.CHAT),
    ),
    (
        "/classify?adapter=complaints",  # it has choices, so that nothing but the field is refused
        '{{"inputs": "x", "parameters": {{"{}": {}}}}}',
        named(ClassifyParameters, fields.CLASSIFY_PARAMETERS),
    ),
    ("/classify?adapter=complaints", '{{"inputs": "x", "{}": {}}}', named(ClassifyBody, fields.CLASSIFY)),
    ("/embed", '{{"inputs": "x", "{}": {}}}', named(EmbedBody, fields.EMBED)),
    ("/v1/embeddings", '{{"input": "x", "{}": {}}}', named(EmbeddingsBody, fields.EMBEDDINGS)),
    # What is asked about has to be there once, so that its own values come by themselves.
    *[(path, '{{"{}": {}}}', ["inputs"]) for path in ("/generate", "/", "/embed", "/classify?adapter=complaints")],
    ("/v1/completions", '{{"{}": {}}}', ["prompt"]),
    ("/v1/chat/completions", '{{"{}": {}}}', ["messages"]),
    ("/v1/embeddings", '{{"{}": {}}}', ["input"]),
]


def resident_bytes() -> int:
    """Of this process, the server's inside among it."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_the_matrix_is_large_enough() -> None:
    assert sum(len(names) for _, _, names in FAMILIES) >= 120


@pytest.mark.parametrize(("path", "body", "names"), FAMILIES)
async def test_no_value_of_any_field_is_our_fault(
    client: httpx.AsyncClient, world: World, path: str, body: str, names: list[str]
) -> None:
    json_type = {"content-type": "application/json"}
    await client.post(path, content=body.format("seed", "1"), headers=json_type)  # what is loaded with the first call
    refused, resident = 0, resident_bytes()
    for name in names:
        for value in VALUES:
            answer = await client.post(path, content=body.format(name, value), headers=json_type)
            assert answer.status_code in (200, 400, 404, 422), (name, value, answer.text)
            if answer.status_code == 200 or answer.status_code == 404:
                continue
            refused += 1
            said = answer.json()
            if path.startswith("/v1"):
                assert answer.status_code == 400
                assert set(said) == {"error"}
            else:
                assert said["status"] == answer.status_code
                assert path not in TGI_PATHS or said["error_type"] == "validation"
            assert len(answer.content) < 6000
            assert ("body: " if value in NO_JSON else name) in answer.text, (name, value, answer.text)
    assert refused > 5 * len(names)
    assert resident_bytes() - resident < 50 << 20
    assert world.engine.num_live == 0


BODIES = [b"", b"nope", b"[]", b'"x"', b"3", b"null", b"{", b"\xff\xfe", b'{"inputs": NaN}', b'{"a":' * 100_000]
BODIES += [b'{"inputs": "x", "prompt": "x", "input": "x", "messages": [], "model": "a", "model": "b"}']
BODIES += [b"[" * 200_000, b'{"prompt": "\\ud83d"}', b'{"inputs": ' + b"9" * 10_000 + b"}", b"{}", b'{"inputs": 1e999}']


@pytest.mark.parametrize("body", BODIES, ids=lambda b: repr(b[:20]))
async def test_bodies_that_are_no_request(client: httpx.AsyncClient, body: bytes) -> None:
    paths = ("/generate", "/generate_stream", "/", "/tokenize", "/classify", "/embed")
    for path in (*paths, "/v1/completions", "/v1/chat/completions", "/v1/embeddings"):
        answer = await client.post(path, content=body)
        assert answer.status_code == (400 if path.startswith("/v1") else 422), (path, answer.text)
        assert len(answer.content) < 4000


async def test_errors_are_bounded_in_number_and_length(client: httpx.AsyncClient) -> None:
    many = {"inputs": "x", "parameters": {f"field_{i}" + "y" * 500: 1 for i in range(1000)}}
    body = (await client.post("/generate", json=many)).json()
    assert len(body["errors"]) == 10
    assert all(len(e["path"]) <= 200 and len(e["reason"]) <= 200 for e in body["errors"])
    assert "990 more" in body["detail"]
    for wrong in ({"prompt": [1.5] * 100_000}, {"prompt": "x", "choices": {str(i): i for i in range(50_000)}}):
        answer = await client.post("/v1/completions", json=wrong)
        assert answer.status_code == 400
        assert len(answer.content) < 2000


async def test_large_bodies_are_counted_as_they_come(client: httpx.AsyncClient) -> None:
    large = {"inputs": "x" * (1 << 20)}
    assert (await client.post("/generate", json=large)).status_code == 413
    openai = await client.post("/v1/completions", json={"prompt": "x" * (1 << 20)})
    assert (openai.status_code, openai.json()["error"]["code"]) == (413, "payload_too_large")

    async def unannounced() -> Any:
        for _ in range(40):
            yield b"x" * 65536

    assert (await client.post("/generate", content=unannounced())).status_code == 413
    lying = await client.post("/generate", content=b"{}", headers={"content-length": "9" * 30})
    assert lying.status_code == 413
    encoded = await client.post("/generate", content=b"{}", headers={"content-encoding": "gzip"})
    assert (encoded.status_code, encoded.json()["code"]) == (415, "unsupported_media_type")


async def test_routes_and_methods_that_do_not_exist(client: httpx.AsyncClient) -> None:
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/generate", 405),
        ("GET", "/v1/nothing", 404),
        ("DELETE", "/v1/completions", 405),
        ("POST", "/adapters/a/b/c", 404),
    ):
        answer = await client.request(method, path)
        assert answer.status_code == status
        body = answer.json()
        assert ("error" in body) == (path.startswith("/v1") or path == "/generate")
    assert (await client.get("/generate")).headers["allow"] == "POST"


async def test_request_ids_are_kept_if_they_are_plain(client: httpx.AsyncClient) -> None:
    for given_id, kept in (("my-id.1:2", True), ("a" * 129, False), ("a b", False), ('"><script>', False), ("", False)):
        answer = await client.post("/generate", json={"inputs": ""}, headers={"x-request-id": given_id})
        assert (answer.headers["x-request-id"] == given_id) is kept
        assert answer.json()["request_id"] == answer.headers["x-request-id"]


async def test_a_fault_of_ours_says_nothing_about_us(client: httpx.AsyncClient, world: World) -> None:
    def broken(request: Any) -> None:
        raise RuntimeError("/secret/path at 0x7f00")

    world.engine.submit = broken  # type: ignore[method-assign]
    for path, body in (("/generate", {"inputs": "x"}), ("/v1/completions", {"prompt": "x"})):
        for stream in (False, True):
            answer = await client.post(f"{path}?adapter=plain", json=body | {"stream": stream})
            assert answer.status_code == 500
            assert "secret" not in answer.text
            assert answer.headers["x-request-id"]
    assert world.num_held == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=150, deadline=None)
def test_any_json_is_read_or_refused(value: Any) -> None:
    try:
        content = json.dumps(value).encode()
    except ValueError:
        return
    try:
        read = parse_object(content)
    except InvalidParameter:
        assert not isinstance(value, dict) or b"NaN" in content or b"Infinity" in content or b"\\u" in content
    else:
        assert read == value


@given(st.dictionaries(st.sampled_from(named(Parameters, fields.PARAMETERS)), JSON, max_size=4))
@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=150, deadline=None)
def test_parameters_are_read_or_refused_by_name(value: dict[str, Any]) -> None:
    paths: list[str] = []
    try:
        validated(Parameters, value, fields.PARAMETERS, path="parameters.")
    except FieldsInvalid as error:
        paths = [each.path for each in error.errors]
    assert all(path.startswith("parameters.") for path in paths)
