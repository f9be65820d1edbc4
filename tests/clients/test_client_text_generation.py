"""TGI's own client, `text-generation`."""

from __future__ import annotations

import pytest

tgi = pytest.importorskip("text_generation")
errors = pytest.importorskip("text_generation.errors")
types = pytest.importorskip("text_generation.types")

ADAPTER = "twitter-complaints"

pytestmark = pytest.mark.filterwarnings("ignore")  # the client's own: it is written for pydantic 1


def test_generate(url: str) -> None:
    client = tgi.Client(url)
    told = client.generate("Once", max_new_tokens=5, decoder_input_details=True, top_n_tokens=2)
    assert "".join(token.text for token in told.details.tokens) == told.generated_text
    assert told.details.prefill[0].logprob is None
    assert len(told.details.top_tokens[0]) == 2
    several = client.generate("Once", best_of=3, do_sample=True, max_new_tokens=4)
    assert len(several.details.best_of_sequences) == 2


def test_generate_with_everything(url: str) -> None:
    client = tgi.Client(url)
    told = client.generate(
        "Once", do_sample=True, seed=3, temperature=0.7, top_k=5, top_p=0.9, typical_p=0.9, truncate=3,
        repetition_penalty=1.1, frequency_penalty=0.3, return_full_text=True, stop_sequences=["e"],
    )  # fmt: skip
    assert told.generated_text.startswith("Once")
    assert told.details.seed == 3
    digits = types.Grammar(type=types.GrammarType.Regex, value="[0-9]{3}")
    assert client.generate("Once", grammar=digits).generated_text.isdigit()


def test_streams(url: str) -> None:
    client = tgi.Client(url)
    pieces = list(client.generate_stream("Once", max_new_tokens=5))
    assert "".join(piece.token.text for piece in pieces) == pieces[-1].generated_text
    assert pieces[-1].generated_text == client.generate("Once", max_new_tokens=5).generated_text
    assert pieces[-1].details.generated_tokens == len(pieces)


def test_the_adapter_in_the_address_or_a_header(url: str) -> None:
    by_address = tgi.Client(f"{url}?adapter={ADAPTER}").generate("my order is late").generated_text
    by_header = tgi.Client(url, headers={"X-Adapter": ADAPTER}).generate("my order is late").generated_text
    assert by_address == by_header
    assert by_address in ("complaint", "no complaint")


def test_chat(url: str) -> None:
    messages = [types.Message(role="user", content="my order is late")]
    told = tgi.Client(url).chat(messages, max_tokens=5, temperature=0.5, seed=1, logprobs=True, top_logprobs=2)
    assert told.choices[0].message.role == "assistant"
    assert told.usage["completion_tokens"] <= 5


def test_each_refusal_has_its_class(url: str) -> None:
    with pytest.raises(errors.ValidationError, match="nobody"):
        tgi.Client(f"{url}?adapter=nobody").generate("x")
    with pytest.raises(errors.ValidationError, match="maximum context length"):
        list(tgi.Client(url).generate_stream("x", max_new_tokens=600))
    with pytest.raises(errors.OverloadedError):
        tgi.Client(url, headers={"X-Max-Wait": "0.000001"}).generate("x")


async def test_asynchronously(url: str) -> None:
    client = tgi.AsyncClient(url)
    told = await client.generate("Once", max_new_tokens=5)
    pieces = [piece.token.text async for piece in client.generate_stream("Once", max_new_tokens=5)]
    assert "".join(pieces) == told.generated_text
    with pytest.raises(errors.ValidationError):
        await client.generate("x", max_new_tokens=600)
