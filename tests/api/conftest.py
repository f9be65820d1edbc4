"""A server over fakes: in this process for most tests, behind a real socket where the socket matters."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from peft_serve.api.app import create_app
from peft_serve.commands.connections import ConnectionLimits, Connections
from tests.api.api_fakes import World, checkpoint, make_world

COMPLAINTS = {
    "template": "Tweet text : {text} Label :",
    "choices": {"complaint": "complaint", "no complaint": "no complaint"},
    "parameters": {"max_new_tokens": 4},
    "labels": ["complaint", "no complaint"],
}


def populate(world: World) -> None:
    """Three adapters: plain, with a profile, and with a soft prompt."""
    world.publish("plain", checkpoint("plain"))
    world.publish("complaints", checkpoint("complaints", profile=COMPLAINTS))
    world.publish("soft", checkpoint("soft", peft_type="PROMPT_TUNING", num_virtual_tokens=100))


@pytest.fixture(scope="session")
def pair_tokenizer() -> Any:
    """Words of a few pieces, with BERT's special tokens and token types."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    text = (
        "where is my order name anna lives in york new the parcel came on monday and who what ? . ##s ##na an mon ##day"
    )
    pieces = text.split(" ")
    vocab = {piece: i for i, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@contextmanager
def running(made: World) -> Iterator[World]:
    """The world with its engine on; at the end everything was given back."""
    made.engine.start()
    yield made
    made.engine.stop()
    assert made.engine.num_live == 0, "every request was ended"
    assert made.num_held == 0, "every adapter was given back"
    made.catalog.check()


def http(world: World) -> httpx.AsyncClient:
    """A client of an application over the world, in this process."""
    app = create_app(world.parts, now=lambda: 1_763_683_200.0)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server")


@pytest.fixture
def encoder(pair_tokenizer: Any, tmp_path: Path) -> Iterator[World]:
    """An encoder without a head of its own, and an adapter for each kind of head."""
    card = {"is_encoder": True, "class_name": "TinyModel", "eos_ids": frozenset(), "max_context": 32}
    made = make_world(pair_tokenizer, tmp_path, card=card)
    made.publish("moods", checkpoint("moods", profile={"labels": ["sad", "glad", "mad"]}, head=["SEQ_CLS", 3]))
    made.publish("moods-too", checkpoint("too", profile={"labels": ["mad", "sad", "glad"]}, head=["SEQ_CLS", 3]))
    made.publish("rating", checkpoint("rating", head=["SEQ_CLS", 1]))
    labels = ["O", "B-PER", "I-PER", "B-LOC"]
    made.publish("names", checkpoint("names", profile={"labels": labels}, head=["TOKEN_CLS", 4]))
    made.publish("reader", checkpoint("reader", head=["QUESTION_ANS", 2]))
    made.publish("plain", checkpoint("plain"))
    made.publish("soft", checkpoint("soft", peft_type="PROMPT_TUNING", num_virtual_tokens=8, head=["SEQ_CLS", 2]))
    with running(made):
        yield made


@pytest.fixture
async def reading(encoder: World) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the encoder's server."""
    async with http(encoder) as made:
        yield made


@pytest.fixture
def world(tiny_tokenizer: Any, tmp_path: Path) -> Iterator[World]:
    made = make_world(tiny_tokenizer, tmp_path)
    populate(made)
    with running(made):
        yield made


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with http(world) as made:
        yield made


@pytest.fixture
def url(world: World) -> Iterator[str]:
    """The address of a real server in a thread."""
    with served(world) as address:
        yield address


@pytest.fixture
def reading_url(encoder: World) -> Iterator[str]:
    """The address of a real server of the encoder."""
    with served(encoder) as address:
        yield address


@contextmanager
def served(world: World, limits: ConnectionLimits | None = None) -> Iterator[str]:
    """A real server, with the connections of a real one."""
    ids = itertools.count(1)
    connections = Connections(limits or ConnectionLimits(max_connections=1000), new_id=lambda: f"refused-{next(ids)}")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            create_app(world.parts),
            log_level="error",
            timeout_graceful_shutdown=1,
            timeout_keep_alive=75,
            http=connections,  # type: ignore[arg-type]
            ws="none",
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
