"""The clients people have, unchanged, against a real socket."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from huggingface_hub import InferenceClient, constants
from huggingface_hub.errors import HfHubHTTPError, OverloadedError, ValidationError

from tests.api.api_fakes import BASE_NAME, World


@pytest.fixture
def oai(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_openai_completions(oai: openai.OpenAI) -> None:
    whole = oai.completions.create(model="plain", prompt="hello", max_tokens=3, temperature=0, logprobs=1)
    assert whole.model == "plain"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 3
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].logprobs is not None
    stream = oai.completions.create(
        model="plain", prompt="hello", max_tokens=3, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    batch = oai.completions.create(model="plain", prompt=["hello", "other"], max_tokens=3, temperature=0)
    assert batch.choices[0].text == whole.choices[0].text


def test_openai_chats(oai: openai.OpenAI) -> None:
    whole = oai.chat.completions.create(
        model="soft", messages=[{"role": "user", "content": "hi"}], temperature=0, logprobs=True, top_logprobs=2
    )
    assert whole.choices[0].logprobs is not None
    stream = oai.chat.completions.create(
        model="soft", messages=[{"role": "user", "content": "hi"}], temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content


def test_openai_models_and_errors(oai: openai.OpenAI, url: str, world: World) -> None:
    assert [model.id for model in oai.models.list()] == [BASE_NAME, "complaints", "plain", "soft"]
    assert oai.models.retrieve("plain").id == "plain"
    with pytest.raises(openai.NotFoundError) as missing:
        oai.completions.create(model="nobody", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        oai.completions.create(model="plain", prompt="x", temperature=9)
    assert wrong.value.param == "temperature"
    named = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", default_query={"adapter": "soft"})
    answer = named.chat.completions.create(model=BASE_NAME, messages=[{"role": "user", "content": "hi"}])
    assert answer.model == "soft"
    named.close()
    world.engine.max_queue = 0
    with pytest.raises(openai.RateLimitError):
        oai.completions.create(model="plain", prompt="x")


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client refuses every address in its offline mode, this machine's own too."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("online")
def test_hugging_face_text_generation(url: str) -> None:
    client = InferenceClient(base_url=url)
    text = client.text_generation("hello", adapter_id="plain", max_new_tokens=3)
    told = client.text_generation("hello", adapter_id="plain", max_new_tokens=3, details=True)
    assert told.generated_text == text
    assert told.details is not None
    assert told.details.generated_tokens == 3
    assert "".join(client.text_generation("hello", adapter_id="plain", max_new_tokens=3, stream=True)) == text
    events = list(client.text_generation("hello", adapter_id="plain", max_new_tokens=3, stream=True, details=True))
    assert events[-1].generated_text == text
    assert events[-1].details is not None
    by_address = InferenceClient(model=f"{url}/generate?adapter=plain")
    assert by_address.text_generation("hello", max_new_tokens=3) == text


@pytest.mark.usefixtures("online")
def test_hugging_face_chats(url: str) -> None:
    for base_url in (url, f"{url}/v1"):
        client = InferenceClient(base_url=base_url)
        messages = [{"role": "user", "content": "hi"}]
        whole = client.chat_completion(messages, model="plain", max_tokens=5, temperature=0.0)
        assert whole.model == "plain"
        stream = client.chat_completion(messages, model="plain", max_tokens=5, temperature=0.0, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert text == whole.choices[0].message.content
        assert client.chat_completion(messages, max_tokens=5).model == BASE_NAME


@pytest.mark.usefixtures("online")
def test_hugging_face_errors(url: str, world: World) -> None:
    client = InferenceClient(base_url=url)
    with pytest.raises(ValidationError):
        client.text_generation("hello", adapter_id="nobody")
    with pytest.raises(ValidationError):
        client.text_generation("x" * 600, max_new_tokens=3)
    world.engine.max_queue = 0
    with pytest.raises(OverloadedError):
        client.text_generation("hello")


def test_openai_embeddings(reading_url: str) -> None:
    with openai.OpenAI(base_url=f"{reading_url}/v1", api_key="unused", max_retries=0) as client:
        coded = client.embeddings.create(model="plain", input=["new york", "my order"])  # it asks for base64 by itself
        plain = client.embeddings.create(model="plain", input=["new york", "my order"], encoding_format="float")
        assert coded.data[1].embedding == pytest.approx(plain.data[1].embedding)
        assert coded.model == "plain"
        assert coded.usage.total_tokens == 8
        base = client.embeddings.create(model=BASE_NAME, input="new york")
        assert base.data[0].embedding != coded.data[0].embedding
        with pytest.raises(openai.BadRequestError) as wrong:
            client.embeddings.create(model="plain", input="new", dimensions=2)
        assert wrong.value.param == "dimensions"
        with pytest.raises(openai.BadRequestError) as encoder:
            client.completions.create(model="plain", prompt="new")
        assert "generates no text" in str(encoder.value)


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("place", ["/classify?adapter={}", "?adapter={}"])
def test_hugging_face_classification(reading_url: str, place: str) -> None:
    def client(adapter: str) -> InferenceClient:
        return InferenceClient(model=reading_url + place.format(adapter))

    moods = client("moods").text_classification("my order", top_k=2)
    assert len(moods) == 2
    assert moods[0].score >= moods[1].score
    entities = client("names").token_classification("anna lives in new york", ignore_labels=[])
    assert [entity.word for entity in entities] == ["anna", "lives", "in", "new", "york"]
    assert (entities[1].start, entities[1].end) == (5, 10)
    groups = client("names").token_classification("anna lives", aggregation_strategy="simple", ignore_labels=[])
    assert groups[0].entity_group is not None
    found = client("reader").question_answering(question="who", context="anna lives in york")
    assert isinstance(found, list)  # the client's own shape for several answers, and for one
    assert found[0].answer in "anna lives in york"
    with pytest.raises(HfHubHTTPError) as missing:
        client("nobody").text_classification("new")
    assert missing.value.response.status_code == 404


@pytest.mark.usefixtures("online")
def test_hugging_face_features(reading_url: str) -> None:
    embedded = InferenceClient(model=f"{reading_url}/embed?adapter=plain").feature_extraction(
        "my order", normalize=True
    )
    assert embedded.shape == (1, 6)
    assert float((embedded**2).sum()) == pytest.approx(1)
    at_root = InferenceClient(base_url=reading_url).feature_extraction("my order")
    assert at_root.shape == (1, 6)
