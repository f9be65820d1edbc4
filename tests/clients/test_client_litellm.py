"""litellm, by its OpenAI, vLLM and Hugging Face providers."""

from __future__ import annotations

from typing import Any

import pytest

litellm = pytest.importorskip("litellm")

ADAPTER, CHAT = "twitter-complaints", [{"role": "user", "content": "my order is late"}]
ANSWERS = ("complaint", "no complaint")

pytestmark = pytest.mark.filterwarnings("ignore")  # what litellm has to say about what it imports


def asked(url: str, model: str = f"openai/{ADAPTER}", **options: Any) -> dict[str, Any]:
    return {"model": model, "api_base": f"{url}/v1", "api_key": "-", "max_retries": 0} | options


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_completion(url: str, provider: str) -> None:
    model = f"{provider}/{ADAPTER}"
    whole = litellm.completion(**asked(url, model, messages=CHAT, max_tokens=5, temperature=0))
    assert whole.choices[0].message.content in ANSWERS
    usage = {"include_usage": True}
    pieces = list(
        litellm.completion(**asked(url, model, messages=CHAT, temperature=0, stream=True, stream_options=usage))
    )
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content
    assert pieces[-1].usage.total_tokens == whole.usage.total_tokens


def test_hugging_face_provider(url: str) -> None:
    told = litellm.completion(model="huggingface/demo-llama", api_base=url, messages=CHAT, max_tokens=5, api_key="-")
    assert told.usage.completion_tokens <= 5


def test_text_completion(url: str) -> None:
    model = f"text-completion-openai/{ADAPTER}"
    whole = litellm.text_completion(**asked(url, model, prompt="my order is late", max_tokens=5, logprobs=2))
    assert whole.choices[0].text in ANSWERS
    pieces = litellm.text_completion(**asked(url, model, prompt=["my order is late"], max_tokens=5, stream=True))
    assert "".join(piece.choices[0].text or "" for piece in pieces) in ANSWERS


def test_embedding(url: str) -> None:
    told = litellm.embedding(**asked(url, "openai/sst2", input=["a fine film", "a bad film"]))
    assert [len(each["embedding"]) for each in told.data] == [256, 256]


async def test_asynchronously(url: str) -> None:
    told = await litellm.acompletion(**asked(url, messages=CHAT, max_tokens=5))
    assert told.choices[0].message.content in ANSWERS


def test_each_refusal_has_its_class(url: str) -> None:
    with pytest.raises(litellm.NotFoundError, match="nobody"):
        litellm.completion(**asked(url, "openai/nobody", messages=CHAT))
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**asked(url, messages=[{"role": "user", "content": "long " * 700}]))
    with pytest.raises(litellm.RateLimitError):
        litellm.completion(**asked(url, messages=CHAT, extra_headers={"X-Max-Wait": "0.000001"}))
