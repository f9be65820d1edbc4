"""OpenAI's own client, of the major versions 2 and 3."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai")

ADAPTER, CHAT = "twitter-complaints", [{"role": "user", "content": "my order is late"}]
COMPLETION_FIELDS = (
    "best_of", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty", "seed",
    "stop", "stream", "stream_options", "suffix", "temperature", "top_p", "user",
)  # fmt: skip
CHAT_FIELDS = (
    "audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs", "max_completion_tokens",
    "max_tokens", "metadata", "modalities", "n", "parallel_tool_calls", "prediction", "presence_penalty",
    "prompt_cache_key", "reasoning_effort", "response_format", "safety_identifier", "seed", "service_tier", "stop",
    "store", "stream", "stream_options", "temperature", "tool_choice", "tools", "top_logprobs", "top_p", "user",
    "verbosity", "web_search_options",
)  # fmt: skip


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as made:
        yield made


def test_prompts_are_texts_lists_and_token_ids(client: Any) -> None:
    one = client.completions.create(model="sst2", prompt="a fine film", max_tokens=3, temperature=0)
    many = client.completions.create(model="sst2", prompt=["a fine film", "a bad film"], max_tokens=3, temperature=0)
    assert [choice.index for choice in many.choices] == [0, 1]
    assert many.choices[0].text == one.choices[0].text
    ids = client.completions.create(model=ADAPTER, prompt=[3, 50, 60], max_tokens=3, temperature=0)
    lists = client.completions.create(model=ADAPTER, prompt=[[3, 50, 60], [70, 80]], max_tokens=3, temperature=0)
    assert lists.choices[0].text == ids.choices[0].text
    assert len(lists.choices) == 2
    assert ids.usage.prompt_tokens == 3


def test_nulls_say_nothing(client: Any) -> None:
    nothing: dict[str, Any] = dict.fromkeys(COMPLETION_FIELDS)
    said = client.completions.create(model="demo-llama", prompt="Once", extra_body=nothing | {"temperature": 0})
    assert said.usage.completion_tokens <= 16
    assert (
        said.choices[0].text
        == client.completions.create(model="demo-llama", prompt="Once", temperature=0).choices[0].text
    )
    chat = client.chat.completions.create(
        model="demo-llama", messages=CHAT, extra_body=dict.fromkeys(CHAT_FIELDS) | {"max_tokens": 3}
    )
    assert chat.usage.completion_tokens <= 3


def test_streams_are_the_whole_answer_in_pieces(client: Any) -> None:
    asked: dict[str, Any] = {"model": "demo-llama", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(prompt="Once", **asked)
    chunks = list(
        client.completions.create(prompt="Once", stream=True, stream_options={"include_usage": True}, **asked)
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    chat = client.chat.completions.create(messages=CHAT, **asked)
    pieces = list(client.chat.completions.create(messages=CHAT, stream=True, **asked))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == chat.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == chat.choices[0].finish_reason
    assert all(p.usage is None and p.system_fingerprint for p in pieces)


def test_the_stream_of_events_makes_a_completion(client: Any) -> None:
    with client.chat.completions.stream(
        model=ADAPTER, messages=CHAT, temperature=0, stream_options={"include_usage": True}
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.role == "assistant"
    assert "complaint" in final.choices[0].message.content
    assert final.usage.completion_tokens > 0


def test_several_answers_seed_stop_and_logprobs(client: Any) -> None:
    asked: dict[str, Any] = {"model": "demo-llama", "messages": CHAT, "n": 3, "seed": 7, "max_tokens": 6, "stop": ["e"]}
    first = client.chat.completions.create(logprobs=True, top_logprobs=2, **asked)
    again = client.chat.completions.create(**asked)
    assert [c.index for c in first.choices] == [0, 1, 2]
    assert [c.message.content for c in first.choices] == [c.message.content for c in again.choices]
    assert all("e" not in c.message.content and c.finish_reason in ("stop", "length") for c in first.choices)
    token = first.choices[0].logprobs.content[0]
    assert bytes(token.bytes).decode() == token.token
    assert len(token.top_logprobs) == 2
    told = client.completions.create(
        model="demo-llama", prompt="Once", max_tokens=2, temperature=0, logprobs=1, echo=True, seed=1
    )
    logprobs = told.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None
    assert len(logprobs.tokens) == len(logprobs.text_offset) == len(logprobs.top_logprobs)


def test_an_answer_of_a_form(client: Any) -> None:
    from pydantic import BaseModel

    class Mood(BaseModel):
        glad: bool

    parsed = client.chat.completions.parse(model="demo-llama", messages=CHAT, response_format=Mood, max_tokens=40)
    assert isinstance(parsed.choices[0].message.parsed, Mood)


def test_embeddings_as_base64_and_as_numbers(client: Any) -> None:
    texts = ["a fine film", "a bad film"]
    coded = client.embeddings.create(model="sst2", input=texts)  # the client asks for base64 by itself
    plain = client.embeddings.create(model="sst2", input=texts, encoding_format="float")
    assert coded.data[1].embedding == pytest.approx(plain.data[1].embedding)
    ids = client.embeddings.create(model="sst2", input=[[3, 5], [6, 7, 8]])
    assert ids.usage.total_tokens == 5
    with pytest.raises(openai.BadRequestError) as wrong:
        client.embeddings.create(model="sst2", input="x", dimensions=2)
    assert wrong.value.param == "dimensions"


def test_the_adapter_in_every_place(client: Any, url: str) -> None:
    raw = client.completions.with_raw_response.create(
        model="demo-llama", prompt="x", max_tokens=2, extra_headers={"X-Adapter": "sst2"}
    )
    assert raw.headers["x-adapter"] == "sst2"
    assert raw.parse()._request_id == raw.headers["x-request-id"]
    beside = client.completions.create(
        model="demo-llama", prompt="x", max_tokens=2, extra_body={"adapter_id": "sst2", "top_k": 3}
    )
    assert beside.model == "sst2"
    for alias in ("dummy", "tgi", "base"):
        assert client.completions.create(model=alias, prompt="x", max_tokens=2).model == "demo-llama"
    with openai.OpenAI(base_url=f"{url}/v1", api_key="-", default_query={"adapter": "sst2"}) as asking:
        assert asking.chat.completions.create(model="demo-llama", messages=CHAT).model == "sst2"


def test_models(client: Any) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == "demo-llama"
    assert ADAPTER in names
    assert client.models.retrieve(ADAPTER).parent == "demo-llama"


def test_each_refusal_has_its_class(client: Any, url: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=CHAT)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="demo-llama", input="x")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="demo-llama", messages=CHAT, temperature=7)
    assert (wrong.value.param, wrong.value.code) == ("temperature", "invalid_parameter")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="demo-llama", prompt="long " * 700)
    assert (long.value.code, "maximum context length is 512" in str(long.value)) == ("context_length_exceeded", True)
    with pytest.raises(openai.RateLimitError) as late:
        client.completions.create(model="demo-llama", prompt="x", extra_headers={"X-Max-Wait": "0.000001"})
    assert int(late.value.response.headers["retry-after"]) >= 1
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=0.01) as hasty,
        pytest.raises(openai.APITimeoutError),
    ):
        hasty.completions.create(model="demo-llama", prompt="x", max_tokens=400, extra_body={"ignore_eos": True})


async def test_many_at_once(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        names = ("sst2", "subj", "demo-llama")
        answers = await asyncio.gather(
            *(client.completions.create(model=name, prompt="x", max_tokens=2) for name in names)
        )
        assert [answer.model for answer in answers] == list(names)
        stream = await client.chat.completions.create(model=ADAPTER, messages=CHAT, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert "complaint" in text
