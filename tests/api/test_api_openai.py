"""`/v1`: bodies, choices, streams, log-probabilities, models."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from peft_serve.errors import AdapterUnavailable
from tests.api.api_fakes import BASE_NAME, World


def chunks(text: str) -> list[dict[str, Any]]:
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def complete(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post("/v1/completions", json={"prompt": "hello", "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


async def chat(client: httpx.AsyncClient, content: Any = "hello", **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    answer = await client.post("/v1/chat/completions", json={"messages": messages, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def test_a_completion_has_openais_shape(client: httpx.AsyncClient, world: World) -> None:
    body = await complete(client, model="plain")
    assert body["object"] == "text_completion"
    assert body["model"] == "plain"
    assert body["created"] == 1_763_683_200
    assert body["system_fingerprint"].startswith("fp_")
    cached = {"cached_tokens": 0}
    tokens = {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    assert body["usage"] == tokens | {"prompt_tokens_details": cached}
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    native = await client.post("/generate?adapter=plain", json={"inputs": "hello"})
    assert choice["text"] == native.json()["generated_text"]


async def test_prompts_come_in_four_shapes(client: httpx.AsyncClient, world: World) -> None:
    ids = [list(world.parts.codec.encode(text)) for text in ("hello", "other")]
    alone = [(await complete(client, prompt=text))["choices"][0]["text"] for text in ("hello", "other")]
    for prompt, expected in (("hello", alone[:1]), (["hello", "other"], alone), (ids[0], alone[:1]), (ids, alone)):
        body = await complete(client, prompt=prompt)
        assert [choice["text"] for choice in body["choices"]] == expected
        assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))


async def test_openais_defaults(client: httpx.AsyncClient, world: World) -> None:
    await client.post("/v1/completions", json={"prompt": "x"})
    await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
    completion, chatted = (request.sampling for request in world.engine.seen)
    assert (completion.max_new_tokens, completion.do_sample, completion.temperature) == (16, True, 1.0)
    assert (chatted.max_new_tokens, chatted.do_sample) == (256, True)
    assert completion.seed != chatted.seed


async def test_n_and_best_of(client: httpx.AsyncClient, world: World) -> None:
    body = await complete(client, prompt=["hello", "other"], n=2, temperature=1, seed=3)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [request.sampling.seed for request in world.engine.seen] == [3, 4, 3, 4]
    assert body["usage"]["prompt_tokens"] == 10
    world.engine.seen.clear()
    assert len((await complete(client, n=1, best_of=4, temperature=1))["choices"]) == 1
    assert len(world.engine.seen) == 4
    assert len((await chat(client, n=3, temperature=1))["choices"]) == 3
    for bad in ({"n": 2, "best_of": 1}, {"n": 1, "best_of": 2, "stream": True}):
        answer = await client.post("/v1/completions", json={"prompt": "x", **bad})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "best_of")


async def test_a_completion_streams_one_chunk_a_token(client: httpx.AsyncClient) -> None:
    whole = await complete(client)
    options = {"include_usage": True}
    answer = await client.post(
        "/v1/completions", json={"prompt": "hello", "temperature": 0, "stream": True, "stream_options": options}
    )
    *got, usage = chunks(answer.text)
    assert len(got) == 6
    assert "".join(chunk["choices"][0]["text"] for chunk in got) == whole["choices"][0]["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in got] == [None] * 5 + ["stop"]
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in got)
    assert len({chunk["id"] for chunk in got}) == 1


async def test_a_stream_of_several_keeps_them_apart(client: httpx.AsyncClient) -> None:
    body = {"prompt": ["hello", "other", "third"], "n": 2, "temperature": 1, "seed": 1}
    whole = await complete(client, **body)
    answer = await client.post("/v1/completions", json=body | {"stream": True})
    texts: dict[int, str] = {}
    for chunk in chunks(answer.text):
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {choice["index"]: choice["text"] for choice in whole["choices"]}


async def test_a_chat_streams_role_words_and_reason(client: httpx.AsyncClient) -> None:
    whole = await chat(client, model="plain")
    assert whole["choices"][0]["message"]["role"] == "assistant"
    assert whole["object"] == "chat.completion"
    body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "stream": True, "model": "plain"}
    got = [chunk["choices"][0] for chunk in chunks((await client.post("/v1/chat/completions", json=body)).text)]
    assert got[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["delta"].get("content", "") for c in got) == whole["choices"][0]["message"]["content"]
    assert got[-1]["delta"] == {}
    assert got[-1]["finish_reason"] == "stop"


async def test_a_stop_string_is_not_shown(client: httpx.AsyncClient, world: World) -> None:
    world.engine.says["hello"] = "one two three"
    for stop in (" two", [" two", "three"], ["zzz", " two"]):
        assert (await complete(client, stop=stop))["choices"][0]["text"] == "one"
        body = {"prompt": "hello", "stop": stop, "stream": True}
        got = chunks((await client.post("/v1/completions", json=body)).text)
        assert "".join(chunk["choices"][0]["text"] for chunk in got) == "one"
        assert got[-1]["choices"][0]["finish_reason"] == "stop"


async def test_logprobs_in_both_shapes(client: httpx.AsyncClient) -> None:
    choice = (await complete(client, logprobs=2))["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert logprobs["token_logprobs"] == [-0.25] * 5
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    body = {"prompt": "hello", "temperature": 0, "logprobs": 0, "stream": True}
    streamed = chunks((await client.post("/v1/completions", json=body)).text)
    assert [c["choices"][0]["logprobs"]["text_offset"] for c in streamed][:5] == [[0], [1], [2], [3], [4]]
    chatted = (await chat(client, logprobs=True, top_logprobs=1))["choices"][0]
    content = chatted["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == chatted["message"]["content"]
    assert all(bytes(e["bytes"]).decode() == e["token"] and len(e["top_logprobs"]) == 1 for e in content)
    answer = await client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}], "top_logprobs": 1}
    )
    assert answer.json()["error"]["param"] == "top_logprobs"


async def test_an_adapters_profile_is_used_and_can_be_switched_off(client: httpx.AsyncClient, world: World) -> None:
    codec = world.parts.codec
    labels = ("complaint", "no complaint")
    completion = await complete(client, model="complaints")
    assert completion["choices"][0]["text"] in labels
    assert codec.decode(world.engine.seen[-1].prompt) == "Tweet text : hello Label :"
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    chatted = await chat(client, parts, model="complaints")
    assert chatted["choices"][0]["message"]["content"] in labels
    assert codec.decode(world.engine.seen[-1].prompt) == "Tweet text : hello Label :"
    await complete(client, model="complaints", template=None, choices=None)
    assert (codec.decode(world.engine.seen[-1].prompt), world.engine.seen[-1].choices) == ("hello", ())
    ids = list(codec.encode("hello"))
    await complete(client, model="complaints", prompt=ids)
    assert list(world.engine.seen[-1].prompt) == ids
    refused = await client.post("/v1/completions", json={"prompt": ids, "choices": ["a", "b"]})
    assert refused.json()["error"]["param"] == "choices"


async def test_choices_stream_as_one_chunk(client: httpx.AsyncClient) -> None:
    body = {"prompt": "hello", "model": "complaints", "stream": True}
    (only,) = chunks((await client.post("/v1/completions", json=body)).text)
    assert only["choices"][0]["text"] in ("complaint", "no complaint")
    chat_body = {"messages": [{"role": "user", "content": "x"}], "model": "complaints", "stream": True}
    got = chunks((await client.post("/v1/chat/completions", json=chat_body)).text)
    assert got[-1]["choices"][0]["finish_reason"] == "stop"


async def test_messages_of_every_kind(client: httpx.AsyncClient, world: World) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one", "name": "ann"},
        {"role": "assistant", "content": None, "annotations": []},
        {"role": "user", "content": [{"type": "text", "text": "two"}]},
    ]
    body = {"messages": messages, "max_completion_tokens": 5}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    prompt = world.parts.codec.decode(world.engine.seen[-1].prompt)
    assert prompt == "system: be brief\nuser: one\nassistant: \nuser: two\nassistant:"
    assert world.engine.seen[-1].sampling.max_new_tokens == 5
    only_system = {"messages": messages[:1], "model": "complaints"}
    assert (await client.post("/v1/chat/completions", json=only_system)).json()["error"]["param"] == "messages"
    picture = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}
    assert (await client.post("/v1/chat/completions", json=picture)).status_code == 400
    both = body | {"max_tokens": 6}
    assert (await client.post("/v1/chat/completions", json=both)).json()["error"]["param"] == "max_tokens"


async def test_too_long_begins_with_openais_words(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 100_000})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["message"].startswith(
        "This model's maximum context length is 512 tokens. However, you requested 100001 tokens"
    )
    limit = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 300})
    assert (limit.status_code, limit.json()["error"]["param"]) == (400, "max_tokens")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_what_is_not_served_is_refused_by_name(client: httpx.AsyncClient, path: str) -> None:
    base = {"prompt": "x"} if path.endswith("v1/completions") else {"messages": [{"role": "user", "content": "x"}]}
    chat_only = [("modalities", ["audio"]), ("functions", [{}])]
    text_only = [("suffix", "y")]
    refused = [
        ("guided_whitespace_pattern", " "),
        ("use_beam_search", True),
        ("frobnicate", 1),
    ]
    for name, value in refused + (text_only if "prompt" in base else chat_only):
        answer = await client.post(path, json=base | {name: value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    harmless = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "logit_bias": {},
        "response_format": {"type": "text"},
    }
    assert (await client.post(path, json=base | harmless | {"frobnicate": None})).status_code == 200


async def test_failures_in_a_stream(client: httpx.AsyncClient, world: World) -> None:
    world.engine.fails[world.adapters["plain"]] = AdapterUnavailable("it does not load")
    world.engine.fails_after[world.adapters["soft"]] = AdapterUnavailable("gone")
    before = await client.post("/v1/completions", json={"prompt": "x", "model": "plain", "stream": True})
    assert (before.status_code, before.json()["error"]["code"]) == (503, "adapter_unavailable")
    after = await client.post("/v1/completions", json={"prompt": "x", "model": "soft", "stream": True})
    assert chunks(after.text)[-1]["error"]["type"] == "server_error"


async def test_models(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert [card["id"] for card in listed["data"]] == [BASE_NAME, "complaints", "plain", "soft"]
    assert [card["parent"] for card in listed["data"]] == [None, BASE_NAME, BASE_NAME, BASE_NAME]
    for name in (BASE_NAME, "plain", "tgi"):
        assert (await client.get(f"/v1/models/{name}")).status_code == 200
    for name in ("nobody", "org/name", "%F0%9F%98%80"):
        answer = await client.get(f"/v1/models/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_an_id_beyond_the_vocabulary_never_reaches_a_step(client: httpx.AsyncClient, world: World) -> None:
    for prompt in ([3, 261], [[3, 4], [2**31 - 1]]):
        answer = await client.post("/v1/completions", json={"prompt": prompt})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert (await client.post("/v1/completions", json={"prompt": [0, 1, 2, 3, 4, 260]})).status_code == 200
    assert len(world.engine.seen) == 1


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "the list is empty"),
        ([[]], "a list of token ids is empty"),
        ([-1], "a token id is a number from 0"),
        ([[5, 2**31]], "a token id is a number from 0"),
        ([True], "token ids, or a list of lists"),
        ([[True]], "token ids, or a list of lists"),
        (["x", 5], "token ids, or a list of lists"),
        (5, "token ids, or a list of lists"),
        ("", "the prompt has no tokens"),
    ],
)
async def test_what_is_wrong_with_a_prompt_is_said_in_one_sentence(
    client: httpx.AsyncClient, prompt: Any, said: str
) -> None:
    answer = await client.post("/v1/completions", json={"prompt": prompt})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "prompt")
    assert error["message"].startswith("prompt: ")
    assert said in error["message"]


async def test_too_long_names_the_fields_of_its_route(client: httpx.AsyncClient) -> None:
    chat = {"messages": [{"role": "user", "content": "x" * 600}]}
    for path, body, param in (
        ("/v1/completions", {"prompt": "x" * 600}, "prompt"),
        ("/v1/chat/completions", chat, "messages"),
    ):
        error = (await client.post(path, json=body)).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        assert "truncate_prompt_tokens" in error["message"]
