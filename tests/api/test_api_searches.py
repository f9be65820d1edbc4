"""Beam search, log-probabilities of prompts, logit bias and time limits, as the routes ask for and tell them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.api.api_fakes import World


async def generate(client: httpx.AsyncClient, **parameters: Any) -> httpx.Response:
    return await client.post("/generate", json={"inputs": "hello", "parameters": parameters})


async def test_the_best_beam_is_the_answer_and_the_others_are_told(client: httpx.AsyncClient, world: World) -> None:
    parameters = {"num_beams": 4, "best_of": 3, "length_penalty": 2.0, "early_stopping": "never", "details": True}
    answer = await generate(client, **parameters)
    body, sampling = answer.json(), world.engine.seen[-1].sampling
    assert (sampling.num_beams, sampling.num_sequences, sampling.do_sample) == (4, 3, False)
    assert (sampling.length_penalty, sampling.early_stopping) == (2.0, "never")
    assert len(world.engine.seen) == 1, "one request finds all of them"
    details = body["details"]
    assert details["score"] == -0.5
    assert [one["score"] for one in details["best_of_sequences"]] == [-1.5, -2.5]
    assert details["best_of_sequences"][0]["generated_text"] == body["generated_text"][1:]
    assert details["best_of_sequences"][0]["generated_tokens"] == details["generated_tokens"] - 1
    assert {one["finish_reason"] for one in (details, *details["best_of_sequences"])} == {"eos_token"}
    assert int(answer.headers["x-generated-tokens"]) == 3 * details["generated_tokens"] - 3


async def test_a_stop_string_cuts_every_beam(client: httpx.AsyncClient, world: World) -> None:
    world.engine.says["hello"] = "one. two. three."
    answer = await generate(client, num_beams=2, best_of=2, details=True, stop=["."])
    body = answer.json()
    assert body["generated_text"] == "one."
    other = body["details"]["best_of_sequences"][0]
    assert other["generated_text"].endswith(".")
    assert other["generated_text"].count(".") == 1
    assert other["finish_reason"] == body["details"]["finish_reason"] == "stop_sequence"


async def test_every_input_has_its_own_beams(client: httpx.AsyncClient, world: World) -> None:
    body = {"inputs": ["a", "b"], "parameters": {"n": 2, "num_beams": 2, "details": True}}
    answers = (await client.post("/generate", json=body)).json()
    assert [len(one["details"]["best_of_sequences"]) for one in answers] == [1, 1]
    assert answers[0]["generated_text"] != answers[1]["generated_text"]
    assert len(world.engine.seen) == 2


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_choices_on_v1_are_beams(client: httpx.AsyncClient, world: World, path: str) -> None:
    said = {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    body = (await client.post(path, json=said | {"num_beams": 3, "n": 2})).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    texts = [choice.get("text") or choice["message"]["content"] for choice in body["choices"]]
    assert texts[1] == texts[0][1:]
    request = world.engine.seen[-1]
    assert not request.sampling.do_sample, "OpenAI's default of sampling gives way"
    assert body["usage"]["prompt_tokens"] == len(request.prompt)
    assert body["usage"]["completion_tokens"] == 2 * (len(texts[0]) + 1) - 1


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"num_beams": 4, "n": 5}, "n"),
        ({"num_beams": 99}, "num_beams"),
        ({"num_beams": 2, "temperature": 0.7}, "num_beams"),
        ({"num_beams": 2, "do_sample": True}, "num_beams"),
        ({"num_beams": 0}, "parameters.num_beams"),
        ({"length_penalty": 11.0}, "parameters.length_penalty"),
        ({"early_stopping": "soon"}, "parameters.early_stopping"),
        ({"num_beam_groups": 2}, "parameters.num_beam_groups"),
        ({"logit_bias": {"a": 1}}, "parameters.logit_bias"),
        ({"logit_bias": {"1": 101}}, "parameters.logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"max_time": 0}, "parameters.max_time"),
        ({"decoder_input_details": True, "details": True, "choices": ["a", "b"]}, "decoder_input_details"),
    ],
)
async def test_what_cannot_be_searched_or_told_is_refused_by_name(
    client: httpx.AsyncClient, world: World, parameters: dict[str, Any], param: str
) -> None:
    answer = await generate(client, **parameters)
    assert answer.status_code == 422, answer.text
    assert param in answer.text
    assert not world.engine.seen


async def test_a_search_is_not_streamed(client: httpx.AsyncClient) -> None:
    for path, body in (
        ("/generate_stream", {"inputs": "x", "parameters": {"num_beams": 2}}),
        ("/v1/completions", {"prompt": "x", "num_beams": 2, "stream": True}),
        ("/generate_stream", {"inputs": "x", "parameters": {"decoder_input_details": True}}),
        ("/v1/completions", {"prompt": "x", "prompt_logprobs": 0, "stream": True}),
    ):
        answer = await client.post(path, json=body)
        assert answer.status_code in (400, 422), path
        assert "stream" in answer.text


async def test_choices_are_scored_and_not_searched_for(client: httpx.AsyncClient, world: World) -> None:
    answer = await generate(client, choices=["a", "b"], num_beams=3)
    assert answer.json()["generated_text"] in ("a", "b")
    assert world.engine.seen[-1].sampling.num_beams == 1


async def test_bias_and_time_reach_the_engine(client: httpx.AsyncClient, world: World) -> None:
    assert (await generate(client, logit_bias={"7": -100, "5": 2.5}, max_time=1.5)).status_code == 200
    request = world.engine.seen[-1]
    assert request.sampling.logit_bias == ((5, 2.5), (7, -100.0))
    assert request.max_time_s == 1.5
    await client.post("/v1/completions", json={"prompt": "x", "logit_bias": {"9": 1}})
    assert world.engine.seen[-1].sampling.logit_bias == ((9, 1.0),)


async def test_the_prompts_tokens_are_told_as_prefill(client: httpx.AsyncClient, world: World) -> None:
    silent = (await generate(client, decoder_input_details=True)).json()
    assert "details" not in silent
    assert world.engine.seen[-1].prompt_logprobs is None, "nobody would see them"
    prefill = (await generate(client, decoder_input_details=True, details=True)).json()["details"]["prefill"]
    assert [one["id"] for one in prefill] == list(world.engine.seen[-1].prompt)
    assert [one["logprob"] for one in prefill] == [None, *(-1.0 - i for i in range(len(prefill) - 1))]
    assert "".join(one["text"] for one in prefill) == "hello"


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_in_front(client: httpx.AsyncClient, world: World, stream: bool) -> None:
    body = {"prompt": "hello", "echo": True, "logprobs": 2, "temperature": 0, "stream": stream}
    answer = await client.post("/v1/completions", json=body)
    if stream:
        chunks = [line[6:] for line in answer.text.split("\n\n") if line.startswith("data: {")]
        choices = [httpx.Response(200, content=chunk).json()["choices"][0] for chunk in chunks]
        text = "".join(choice["text"] for choice in choices)
        told: dict[str, list[Any]] = {}
        for choice in choices:
            for name, values in (choice["logprobs"] or {}).items():
                told.setdefault(name, []).extend(values)
    else:
        choice = answer.json()["choices"][0]
        text, told = choice["text"], choice["logprobs"]
    prompt = world.engine.seen[-1].prompt
    assert text.startswith("hello")
    assert {len(values) for values in told.values()} == {len(prompt) + 6}, "an entry for each id, the last one too"
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    assert told["token_logprobs"][1 : len(prompt)] == [-1.0 - i for i in range(len(prompt) - 1)]
    assert told["text_offset"][0] == 0
    assert all(text[at:].startswith(token) for at, token in zip(told["text_offset"][:-1], told["tokens"], strict=False))


async def test_a_text_can_be_scored_and_nothing_generated(client: httpx.AsyncClient, world: World) -> None:
    body = {"prompt": ["hello", "no"], "echo": True, "max_tokens": 0, "logprobs": 0}
    answer = (await client.post("/v1/completions", json=body)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["hello", "no"]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"]["completion_tokens"] == 0
    assert world.engine.seen[-1].sampling.max_new_tokens == 0
    refused = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 0})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


async def test_vllms_prompt_logprobs(client: httpx.AsyncClient, world: World) -> None:
    body = {"prompt": "hello", "prompt_logprobs": 2}
    told = (await client.post("/v1/completions", json=body)).json()["choices"][0]["prompt_logprobs"]
    ids = world.engine.seen[-1].prompt
    assert told[0] is None
    assert told[1][str(ids[1])]["rank"] == 1
    assert told[1][str(ids[1])]["logprob"] == -1.0
    assert [len(one) for one in told[1:]] == [2] * (len(ids) - 1)
    chat = {"messages": [{"role": "user", "content": "some words"}], "prompt_logprobs": 0}
    assert len((await client.post("/v1/chat/completions", json=chat)).json()["prompt_logprobs"]) > 1
