"""LangChain: `langchain-openai` and `langchain-huggingface`."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("langchain_core")
openai = pytest.importorskip("langchain_openai")
hugging = pytest.importorskip("langchain_huggingface")

ADAPTER, TEXT, ANSWERS = "twitter-complaints", "my order is late", ("complaint", "no complaint")

pytestmark = pytest.mark.filterwarnings("ignore")  # what LangChain's packages have to say about each other


def chat(url: str, **options: Any) -> Any:
    said = {"model": ADAPTER, "max_tokens": 6, "temperature": 0, "max_retries": 0} | options
    return openai.ChatOpenAI(base_url=f"{url}/v1", api_key="-", **said)


def test_chat_openai(url: str) -> None:
    whole = chat(url).invoke(TEXT)
    assert whole.content in ANSWERS
    assert whole.usage_metadata["output_tokens"] > 0
    pieces = list(chat(url, stream_usage=True).stream(TEXT))
    assert "".join(piece.content for piece in pieces) == whole.content
    assert any(piece.usage_metadata == whole.usage_metadata for piece in pieces)
    both = chat(url, n=2, seed=1, stop=["x"], logprobs=True, top_p=0.9, temperature=1).batch([TEXT, "thank you"])
    assert [each.content in ANSWERS for each in both] == [True, True]


async def test_chat_openai_asynchronously(url: str) -> None:
    whole = await chat(url).ainvoke(TEXT)
    assert "".join([piece.content async for piece in chat(url).astream(TEXT)]) == whole.content


def test_an_answer_of_a_form(url: str) -> None:
    from pydantic import BaseModel

    class Mood(BaseModel):
        glad: bool

    model = chat(url, model="demo-llama", max_tokens=40).with_structured_output(Mood, method="json_schema")
    assert isinstance(model.invoke(TEXT), Mood)


def test_openai_completions(url: str) -> None:
    model = openai.OpenAI(model=ADAPTER, base_url=f"{url}/v1", api_key="-", max_tokens=6, temperature=0)
    whole = model.invoke(TEXT)
    assert whole in ANSWERS
    assert "".join(model.stream(TEXT)) == whole
    assert model.batch([TEXT, "thank you"])[0] == whole  # one request with a list of prompts
    several = openai.OpenAI(model="demo-llama", base_url=f"{url}/v1", api_key="-", max_tokens=4, n=2, best_of=3)
    assert [len(made) for made in several.generate([TEXT, "thank you"]).generations] == [2, 2]


def test_openai_embeddings(url: str) -> None:
    model = openai.OpenAIEmbeddings(model="sst2", base_url=f"{url}/v1", api_key="-", check_embedding_ctx_length=False)
    many = model.embed_documents(["a fine film", "a bad film"])
    assert model.embed_query("a fine film") == pytest.approx(many[0], abs=1e-5)


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("place", ["address", "field", "header"])
def test_hugging_face_endpoint(url: str, place: str) -> None:
    options: dict[str, Any] = {
        "address": {"endpoint_url": f"{url}/generate?adapter={ADAPTER}"},
        "field": {"endpoint_url": url, "model_kwargs": {"adapter_id": ADAPTER}},
        "header": {"endpoint_url": url, "server_kwargs": {"headers": {"X-Adapter": ADAPTER}}},
    }[place]
    model = hugging.HuggingFaceEndpoint(max_new_tokens=5, **options)
    whole = model.invoke(TEXT)
    assert whole in ANSWERS
    assert "".join(model.stream(TEXT)) == whole


@pytest.mark.usefixtures("online")
async def test_hugging_face_endpoint_asynchronously(url: str) -> None:
    model = hugging.HuggingFaceEndpoint(endpoint_url=f"{url}/generate?adapter={ADAPTER}", max_new_tokens=5)
    assert await model.ainvoke(TEXT) in ANSWERS


@pytest.mark.usefixtures("online")
def test_chat_hugging_face(url: str) -> None:
    model = hugging.ChatHuggingFace(llm=hugging.HuggingFaceEndpoint(endpoint_url=url, max_new_tokens=5))
    assert model.invoke("hi").response_metadata["token_usage"]["completion_tokens"] <= 5
    assert "".join(piece.content for piece in model.stream("hi"))
