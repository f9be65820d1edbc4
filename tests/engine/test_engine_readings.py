"""A whole server's inside over an encoder and over a classifying decoder: upload, submit, read, refuse."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from peft_serve.adapters.manifest import Manifest, decode_manifest, encode_manifest
from peft_serve.adapters.records import HeadFacts, Profile
from peft_serve.config import Settings
from peft_serve.core import BASE, AdapterId, FinishEvent, FinishReason, Reading, ReadingEvent, Request, RequestId
from peft_serve.engine.assembly import build
from peft_serve.engine.client import EngineClient
from peft_serve.engine.parts import ServerParts
from peft_serve.errors import InvalidParameter
from peft_serve.model.base import ResidentBase
from tests.model.tiny_encoders import HIDDEN, enlivened, tiny_encoder
from tests.parity.bases import word_codec
from tests.parity.reading_oracle import adapted, compiled, files_of, own_logits

VOCAB = 64
PROMPT = (9, 30, 12, 41, 5)


def save_base(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    word_codec(is_encoder_decoder=False)._tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]


async def ask(parts: ServerParts, engine: Any, requests: list[Request]) -> list[list[Any]]:
    """The events of each request, all of them submitted at once."""
    client = EngineClient(engine, asyncio.get_running_loop())
    streams = [client.submit(request) for request in requests]
    return [[event async for event in stream] for stream in streams]


def request(number: int, adapter: AdapterId = BASE, reading: Reading | None = Reading.SEQUENCE) -> Request:
    return Request(id=RequestId(f"r{number}"), adapter=adapter, prompt=PROMPT, reading=reading)


def _rows(events: list[Any]) -> torch.Tensor:
    reading, finish = events
    assert isinstance(reading, ReadingEvent)
    assert isinstance(finish, FinishEvent)
    assert finish.reason is FinishReason.READ
    return torch.tensor(reading.rows)


async def test_an_encoder_is_served_from_upload_to_reading(tmp_path: Path) -> None:
    own = tiny_encoder("bert", "SEQ_CLS", num_labels=3)
    own.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    save_base(own, tmp_path / "base")
    parts, engine = build(Settings(model=str(tmp_path / "base"), store=tmp_path / "store"), say=lambda _: None)
    assert parts.base.is_encoder
    assert parts.base.head == HeadFacts("SEQ_CLS", 3)
    assert parts.base.labels == ("no", "maybe", "yes")
    assert parts.base.max_context == 64
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "dense"])
    model = adapted(tiny_encoder("bert", "SEQ_CLS", num_labels=5), config)
    parts.catalog.changes.publish("five", files_of(model))
    found = parts.catalog.resolve("five")
    assert found.head == HeadFacts("SEQ_CLS", 5)
    engine.start()
    try:
        base, five, embedding, text = await ask(
            parts,
            engine,
            [request(0), request(1, found.id), request(2, found.id, Reading.MEAN), request(3, reading=None)],
        )
    finally:
        engine.stop()
    torch.testing.assert_close(_rows(base), own_logits(own, PROMPT), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(_rows(five), own_logits(model, PROMPT), rtol=1e-4, atol=1e-5)
    assert _rows(embedding).shape == (1, HIDDEN)
    (refused,) = text
    assert refused.reason is FinishReason.FAILED
    assert isinstance(refused.error, InvalidParameter)


def test_the_manifest_remembers_the_head() -> None:
    base = ResidentBase(tiny_encoder("bert"), name="bert")
    for task, head in (("TOKEN_CLS", HeadFacts("TOKEN_CLS", 4)), ("FEATURE_EXTRACTION", None)):
        config = peft.LoraConfig(task_type=task, target_modules=["query"])
        _, summary = compiled(files_of(adapted(tiny_encoder("bert", task, num_labels=4), config)), base)
        manifest = Manifest(checked_for="x", summary=summary, profile=Profile())
        assert summary.head == head
        assert decode_manifest(encode_manifest(manifest)) == manifest


@pytest.mark.parametrize("is_bare", [False, True], ids=["with a head", "bare"])
async def test_a_decoder_that_generates_nothing_says_so_on_its_card(tmp_path: Path, is_bare: bool) -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        num_labels=4,
    )
    wrap = transformers.LlamaModel if is_bare else transformers.LlamaForSequenceClassification
    own = enlivened(wrap._from_config(config, attn_implementation="eager"))
    save_base(own, tmp_path / "base")
    parts, engine = build(Settings(model=str(tmp_path / "base"), store=tmp_path / "store"), say=lambda _: None)
    assert parts.base.is_encoder == is_bare
    assert (parts.base.head is None) == is_bare
    engine.start()
    try:
        (events,) = await ask(parts, engine, [request(0, reading=Reading.LAST if is_bare else Reading.SEQUENCE)])
    finally:
        engine.stop()
    with torch.no_grad():
        expected = own(torch.tensor([PROMPT]))
    own_rows = expected.last_hidden_state[0, -1:] if is_bare else expected.logits
    torch.testing.assert_close(_rows(events), own_rows, rtol=1e-4, atol=1e-5)
