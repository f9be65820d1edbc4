"""LoRAX' own client, `lorax-client`."""

from __future__ import annotations

import pytest

lorax = pytest.importorskip("lorax")
errors = pytest.importorskip("lorax.errors")

ADAPTER = "twitter-complaints"

pytestmark = pytest.mark.filterwarnings("ignore")  # the client's own: it is written for pydantic 1


def test_generate(url: str) -> None:
    client = lorax.Client(url)
    told = client.generate("my order is late", adapter_id=ADAPTER, adapter_source="local", api_token="unused")
    assert told.generated_text in ("complaint", "no complaint")
    assert told.details.prompt_tokens > 0
    base = client.generate("Once", max_new_tokens=4, return_k_alternatives=2, decoder_input_details=True)
    assert [len(token.alternative_tokens) for token in base.details.tokens] == [2] * base.details.generated_tokens
    assert base.details.prefill[0].logprob is None
    endless = client.generate("Once", max_new_tokens=60, ignore_eos_token=True)
    assert (endless.details.generated_tokens, endless.details.finish_reason) == (60, "length")


def test_generate_with_everything(url: str) -> None:
    told = lorax.Client(url).generate(
        "Once", do_sample=True, max_new_tokens=4, best_of=2, repetition_penalty=1.1, return_full_text=True,
        stop_sequences=["e"], temperature=0.8, top_k=5, top_p=0.9, truncate=3, typical_p=0.9,
    )  # fmt: skip
    assert told.generated_text.startswith("Once")
    assert len(told.details.best_of_sequences) == 1


def test_an_answer_of_a_form(url: str) -> None:
    schema = {"type": "object", "properties": {"glad": {"type": "boolean"}}, "required": ["glad"]}
    told = lorax.Client(url).generate("Once", response_format={"type": "json_object", "schema": schema})
    assert told.generated_text.startswith("{")


def test_streams(url: str) -> None:
    pieces = list(lorax.Client(url).generate_stream("Once", adapter_id="sst2", max_new_tokens=5))
    assert "".join(piece.token.text for piece in pieces) == pieces[-1].generated_text
    assert pieces[-1].details.prompt_tokens > 0


def test_embed_and_classify(encoder_url: str) -> None:
    client = lorax.Client(encoder_url, headers={"X-Adapter": "names"})
    assert len(client.embed("where is my order ?").embeddings) == 32
    assert isinstance(client.classify("anna lives in new york").entities, list)
    assert len(client.classify_batch(["anna lives", "in new york"])) == 2


def test_each_refusal_has_its_class(url: str) -> None:
    client = lorax.Client(url)
    with pytest.raises(errors.ValidationError, match="nobody"):
        client.generate("x", adapter_id="nobody")
    with pytest.raises(errors.ValidationError, match="maximum context length"):
        list(client.generate_stream("x", max_new_tokens=600))
    merged = lorax.MergedAdapters(ids=["sst2", "subj"], weights=[0.5, 0.5], density=0.5)
    with pytest.raises(errors.ValidationError, match=r"a:0\.7\+b:0\.3"):
        client.generate("x", merged_adapters=merged)
    with pytest.raises(errors.ValidationError, match="adapter_source"):
        client.generate("x", adapter_id=ADAPTER, adapter_source="hub")
    with pytest.raises(errors.ValidationError, match="task head"):
        client.classify("x")


async def test_asynchronously(url: str) -> None:
    client = lorax.AsyncClient(url)
    told = await client.generate("my order is late", adapter_id=ADAPTER)
    pieces = [p.token.text async for p in client.generate_stream("my order is late", adapter_id=ADAPTER)]
    assert "".join(pieces) == told.generated_text
