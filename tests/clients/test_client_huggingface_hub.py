"""The hub's InferenceClient, of the major versions 0, 1 and 2."""

from __future__ import annotations

from typing import Any

import pytest

hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")

ADAPTER, CHAT = "twitter-complaints", [{"role": "user", "content": "my order is late"}]

pytestmark = [pytest.mark.usefixtures("online"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_text_generation(url: str) -> None:
    client = hub.InferenceClient(url)
    text = client.text_generation("Once", max_new_tokens=5)
    told = client.text_generation("Once", max_new_tokens=5, details=True, decoder_input_details=True, top_n_tokens=2)
    assert told.generated_text == text
    assert len(told.details.tokens) == told.details.generated_tokens
    assert told.details.prefill[0].logprob is None
    assert len(told.details.top_tokens[0]) == 2
    assert "".join(client.text_generation("Once", max_new_tokens=5, stream=True)) == text
    events = list(client.text_generation("Once", max_new_tokens=5, stream=True, details=True))
    assert events[-1].generated_text == text
    assert events[-1].details.finish_reason == told.details.finish_reason


def test_text_generation_with_everything(url: str) -> None:
    everything: dict[str, Any] = {
        "best_of": 2, "do_sample": True, "frequency_penalty": 0.1, "max_new_tokens": 4, "repetition_penalty": 1.1,
        "return_full_text": True, "seed": 3, "stop": ["e"], "temperature": 0.8, "top_k": 4, "top_p": 0.9,
        "truncate": 4, "typical_p": 0.9, "watermark": False, "details": True,
    }  # fmt: skip
    told = hub.InferenceClient(url).text_generation("Once", **everything)
    assert told.generated_text.startswith("Once")
    assert len(told.details.best_of_sequences) == 1
    digits = hub.InferenceClient(url).text_generation("Once", grammar={"type": "regex", "value": "[0-9]{2}"})
    assert digits.isdigit()


def test_the_adapter_in_every_place(url: str) -> None:
    texts = {
        hub.InferenceClient(url).text_generation("my order is late", adapter_id=ADAPTER),
        hub.InferenceClient(f"{url}/generate?adapter={ADAPTER}").text_generation("my order is late"),
        hub.InferenceClient(url, headers={"X-Adapter": ADAPTER}).text_generation("my order is late"),
    }
    assert len(texts) == 1
    assert texts <= {"complaint", "no complaint"}


def test_chat_completion(url: str) -> None:
    for base_url in (url, f"{url}/v1"):
        client = hub.InferenceClient(base_url=base_url)
        whole = client.chat_completion(CHAT, model=ADAPTER, temperature=0.0, logprobs=True)
        assert whole.model == ADAPTER
        stream = client.chat_completion(
            CHAT, model=ADAPTER, temperature=0.0, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    two = client.chat.completions.create(
        messages=CHAT, n=2, max_tokens=4, seed=1, stop=["z"], temperature=0.5, top_p=0.9, presence_penalty=0.1
    )
    assert (two.model, len(two.choices)) == ("demo-llama", 2)


def test_text_classification(url: str, encoder_url: str) -> None:
    by_choices = hub.InferenceClient(f"{url}/classify?adapter={ADAPTER}").text_classification("my order is late")
    assert {each.label for each in by_choices} == {"complaint", "no complaint"}
    for place in ("/classify?adapter=moods", "?adapter=moods"):
        moods = hub.InferenceClient(encoder_url + place).text_classification("where is my order ?", top_k=2)
        assert len(moods) == 2
        assert moods[0].score >= moods[1].score


def test_token_classification(encoder_url: str) -> None:
    client = hub.InferenceClient(f"{encoder_url}/classify?adapter=names")
    words = client.token_classification("anna lives in new york", ignore_labels=[])
    assert [each.word for each in words] == ["anna", "lives", "in", "new", "york"]
    assert (words[1].start, words[1].end) == (5, 10)
    groups = client.token_classification("anna lives", aggregation_strategy="simple", ignore_labels=[])
    assert groups[0].entity_group is not None


def test_feature_extraction(url: str, encoder_url: str) -> None:
    pytest.importorskip("numpy")
    one = hub.InferenceClient(f"{url}/embed?adapter=sst2").feature_extraction("a fine film", normalize=True)
    assert one.shape[0] == 1
    assert float((one**2).sum()) == pytest.approx(1)
    many = hub.InferenceClient(encoder_url).feature_extraction(
        ["my order", "new york"], truncate=True, truncation_direction="right"
    )
    assert many.shape == (2, 32)


def test_each_refusal_has_its_class(url: str) -> None:
    client = hub.InferenceClient(url)
    with pytest.raises(errors.ValidationError, match="nobody"):
        client.text_generation("x", adapter_id="nobody")
    with pytest.raises(errors.ValidationError, match="maximum context length"):
        client.text_generation("x", max_new_tokens=600)
    with pytest.raises(errors.OverloadedError):
        hub.InferenceClient(url, headers={"X-Max-Wait": "0.000001"}).text_generation("x")
    with pytest.raises(errors.HfHubHTTPError, match="nobody") as missing:
        hub.InferenceClient(f"{url}/classify?adapter=nobody").text_classification("x")
    assert missing.value.response.status_code == 404
    with pytest.raises(errors.HfHubHTTPError) as chat:
        client.chat_completion(CHAT, model="nobody")
    assert chat.value.response.status_code == 404


async def test_asynchronously(url: str) -> None:
    async with hub.AsyncInferenceClient(url, headers={"X-Adapter": "sst2"}) as client:
        text = await client.text_generation("a fine film")
        stream = await client.text_generation("a fine film", stream=True)
        assert "".join([piece async for piece in stream]) == text
        assert (await client.chat_completion(CHAT, max_tokens=2)).model == "sst2"
