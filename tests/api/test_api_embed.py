"""`/embed` and `/v1/embeddings`."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
from pathlib import Path
from typing import Any

import httpx
import pytest

from peft_serve.core import BASE, Reading
from tests.api.api_fakes import BASE_NAME, HIDDEN, World, checkpoint, make_world
from tests.api.conftest import http, running


async def test_a_vector_for_each_text(reading: httpx.AsyncClient, encoder: World) -> None:
    one = await reading.post("/embed?adapter=plain", json={"inputs": "my order"})
    assert one.status_code == 200, one.text
    assert [len(vector) for vector in one.json()] == [HIDDEN]
    assert encoder.engine.seen[-1].reading is Reading.MEAN
    assert one.headers["x-adapter"] == "plain"
    both = await reading.post("/embed", json={"inputs": ["my order", "new"], "adapter": ["plain", None]})
    assert both.json()[0] == one.json()[0]
    assert encoder.engine.seen[-1].adapter == BASE
    assert both.headers["x-prompt-tokens"] == "7"


async def test_pooling_length_and_cutting(reading: httpx.AsyncClient, encoder: World) -> None:
    for pooling, wanted in (("first", Reading.FIRST), ("last", Reading.LAST), ("mean", Reading.MEAN)):
        for body in ({"pooling": pooling}, {"parameters": {"pooling": pooling}}):
            assert (await reading.post("/embed", json={"inputs": "new", **body})).status_code == 200
            assert encoder.engine.seen[-1].reading is wanted
    raw = (await reading.post("/embed", json={"inputs": "new"})).json()[0]
    unit = (await reading.post("/embed", json={"inputs": "new", "normalize": True})).json()[0]
    assert math.hypot(*unit) == pytest.approx(1)
    assert unit == pytest.approx([value / math.hypot(*raw) for value in raw])
    encoder.engine.reads = lambda _: [[0.0] * HIDDEN]
    assert (await reading.post("/embed", json={"inputs": "new", "normalize": True})).json() == [[0.0] * HIDDEN]
    long = {"inputs": "new " * 99}
    assert (await reading.post("/embed", json=long)).json()["code"] == "context_length_exceeded"
    assert (await reading.post("/embed", json=long | {"truncate": True})).status_code == 200
    assert len(encoder.engine.seen[-1].prompt) == 32


async def test_what_contradicts_itself_or_is_not_served_is_refused(reading: httpx.AsyncClient) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"pooling": "max"}, "pooling"),
        ({"pooling": "first", "parameters": {"pooling": "last"}}, "pooling"),
        ({"prompt_name": "query"}, "prompt_name"),
        ({"truncation_direction": "left"}, "truncation_direction"),
        ({"dimensions": 3}, "dimensions"),
        ({"max_new_tokens": 3}, "max_new_tokens"),
        ({"inputs": []}, "inputs"),
    ]
    for body, param in cases:
        answer = await reading.post("/embed", json={"inputs": "new", **body})
        assert (answer.status_code, answer.json()["param"]) == (422, param), answer.text
    harmless = {"inputs": "new", "truncation_direction": "right", "prompt_name": None, "options": {}}
    assert (await reading.post("/embed", json=harmless)).status_code == 200


async def test_a_template_goes_around_the_text(client: httpx.AsyncClient, world: World) -> None:
    world.publish("query", checkpoint("query", profile={"template": "query: {text}"}))

    async def asked(**body: Any) -> str:
        answer = await client.post("/embed?adapter=query", json={"inputs": "x", **body})
        assert answer.status_code == 200, answer.text
        return world.parts.codec.decode(world.engine.seen[-1].prompt)

    assert await asked() == "query: x"
    assert await asked(template=None) == "x"
    assert await asked(template="<{text}>") == "<x>"


async def test_openai_shape(reading: httpx.AsyncClient, encoder: World) -> None:
    raw = (await reading.post("/embed?adapter=plain", json={"inputs": ["new", "york"]})).json()
    answer = await reading.post("/v1/embeddings", json={"model": "plain", "input": ["new", "york"]})
    body = answer.json()
    assert body["object"] == "list"
    assert body["model"] == "plain"
    assert body["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    assert [(each["object"], each["index"], each["embedding"]) for each in body["data"]] == [
        ("embedding", 0, raw[0]),
        ("embedding", 1, raw[1]),
    ]
    coded = await reading.post(
        "/v1/embeddings?adapter=plain", json={"input": "new", "encoding_format": "base64", "user": "me"}
    )
    packed = base64.b64decode(coded.json()["data"][0]["embedding"])
    assert struct.unpack(f"<{HIDDEN}f", packed) == pytest.approx(raw[0])
    assert (await reading.post("/v1/embeddings", json={"input": "new"})).json()["model"] == BASE_NAME


async def test_token_ids_are_taken_as_they_are(reading: httpx.AsyncClient, encoder: World) -> None:
    answer = await reading.post("/v1/embeddings", json={"input": [2, 7, 3]})
    assert encoder.engine.seen[-1].prompt == (2, 7, 3)
    assert answer.json()["usage"]["prompt_tokens"] == 3
    both = await reading.post("/v1/embeddings", json={"input": [[2, 7, 3], [2, 3]]})
    assert len(both.json()["data"]) == 2
    beyond = await reading.post("/v1/embeddings", json={"input": [9999]})
    assert (beyond.status_code, "not in the vocabulary" in beyond.text) == (400, True)


async def test_openai_refusals_have_its_shape(reading: httpx.AsyncClient) -> None:
    same = await reading.post("/v1/embeddings", json={"input": "new", "dimensions": HIDDEN})
    assert same.status_code == 200
    cases = (
        ({"input": "new", "dimensions": 3}, "dimensions", 400),
        ({"input": "new " * 99}, "input", 400),
        ({"input": []}, "input", 400),
        ({"input": "new", "encoding_format": "int8"}, "encoding_format", 400),
        ({"input": "new", "model": "nobody"}, "adapter", 404),
    )
    for body, param, status in cases:
        answer = await reading.post("/v1/embeddings", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


async def test_an_encoder_decoder_is_not_read(tiny_tokenizer: Any, tmp_path: Path) -> None:
    made = make_world(tiny_tokenizer, tmp_path, is_encoder_decoder=True)
    with running(made):
        async with http(made) as client:
            answer = await client.post("/embed", json={"inputs": "x"})
            assert (answer.status_code, "encoder-decoder" in answer.json()["detail"]) == (422, True)
            chosen = await client.post("/classify", json={"inputs": "x", "parameters": {"choices": ["a", "b"]}})
            assert chosen.status_code == 200
            assert (await client.get("/v1/models/base")).json()["tasks"] == ["generate"]


async def test_a_reader_that_goes_away_is_cancelled(reading_url: str, encoder: World) -> None:
    encoder.engine.held = True
    async with httpx.AsyncClient(base_url=reading_url) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/embed?adapter=plain", json={"inputs": ["new", "york"]}, timeout=1.5)
    for _ in range(1000):  # the engine is held all the while: it cannot answer before the server has seen it
        if len(encoder.engine.cancelled) == 2:
            break
        await asyncio.sleep(0.01)
    assert len(encoder.engine.cancelled) == 2
