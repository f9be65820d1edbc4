"""Encoders with rows side by side: every row's states are those of transformers, whoever its neighbours are."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import PreTrainedModel

from peft_serve.adapters.base import SiteKind
from peft_serve.adapters.primitives import Adapter, KVPrefix
from peft_serve.core import BASE, AdapterId, Reading
from peft_serve.errors import PromptTooLong
from peft_serve.model.base import ResidentBase
from peft_serve.model.routing import Stream
from tests.model.reading_driver import ReadingDriver, Wish
from tests.model.tiny_encoders import CONFIGS, HIDDEN, VOCAB, tiny_encoder

POOLED = (Reading.FIRST, Reading.LAST, Reading.MEAN)


@torch.no_grad()
def states_of(model: PreTrainedModel, wish: Wish) -> torch.Tensor:
    """The library's last hidden states [tokens, d] of one prompt alone."""
    more = {"token_type_ids": torch.tensor([wish.segments])} if wish.segments else {}
    ids = torch.tensor([wish.prompt])
    return model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).last_hidden_state[0]


def pooled(states: torch.Tensor, reading: Reading) -> torch.Tensor:
    return {Reading.FIRST: states[:1], Reading.LAST: states[-1:]}.get(reading, states.mean(dim=0, keepdim=True))


def wishes_for(family: str, *, count: int = 18, low_id: int = 5) -> list[Wish]:
    make = random.Random(3)
    wishes = []
    for i in range(count):
        prompt = tuple(make.randrange(low_id, VOCAB) for _ in range(make.randint(1, 20)))
        types = tuple(int(j > len(prompt) // 2) for j in range(len(prompt))) if family in ("bert", "electra") else ()
        wishes.append(Wish(POOLED[i % 3], prompt, segments=types if i % 2 else ()))
    return wishes


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("max_step_tokens", [16, 512], ids=["few at a time", "all at once"])
def test_states_are_those_of_transformers(family: str, max_step_tokens: int) -> None:
    model, wishes = tiny_encoder(family), wishes_for(family)
    expected = [pooled(states_of(model, wish), wish.reading) for wish in wishes]
    driver = ReadingDriver(ResidentBase(model, name=family), max_step_tokens=max_step_tokens)
    for rows, own in zip(driver.read(wishes), expected, strict=True):
        torch.testing.assert_close(torch.tensor(rows), own, rtol=1e-5, atol=1e-5)
    assert (len(driver.num_rows_by_step) == 1) == (max_step_tokens == 512)


@pytest.mark.parametrize("family", ["roberta", "camembert"])
def test_an_id_of_padding_in_a_prompt_has_the_position_that_the_library_gives_it(family: str) -> None:
    model = tiny_encoder(family)
    wishes = [Wish(Reading.MEAN, (7, model.config.pad_token_id, 9, 11)), Wish(Reading.MEAN, (8, 10, 12))]
    expected = [pooled(states_of(model, wish), wish.reading) for wish in wishes]
    for rows, own in zip(ReadingDriver(ResidentBase(model, name=family)).read(wishes), expected, strict=True):
        torch.testing.assert_close(torch.tensor(rows), own, rtol=1e-5, atol=1e-5)


def test_a_longer_prompt_than_a_step_has_tokens_for_is_read_whole() -> None:
    model = tiny_encoder("bert")
    wish = Wish(Reading.LAST, tuple(range(5, 55)))
    expected = states_of(model, wish)[-1:]
    (rows,) = ReadingDriver(ResidentBase(model, name="bert"), max_step_tokens=8).read([wish])
    torch.testing.assert_close(torch.tensor(rows), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "limit"), [("bert", 64), ("roberta", 62)])
def test_a_prompt_beyond_the_table_of_positions_fails_alone(family: str, limit: int) -> None:
    base = ResidentBase(tiny_encoder(family), name=family)
    assert base.shape.max_positions == limit
    wishes = [Wish(Reading.LAST, (5,) * n) for n in (limit, limit + 1)]
    fits, fails = ReadingDriver(base).read(wishes)
    assert isinstance(fits, tuple)
    assert isinstance(fails, PromptTooLong)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_shape_says_what_an_encoder_is(family: str) -> None:
    base = ResidentBase(tiny_encoder(family, "SEQ_CLS"), name=family)
    shape = base.shape
    assert shape.is_encoder
    assert not shape.generates
    assert not shape.is_encoder_decoder
    assert shape.state_size == HIDDEN
    assert shape.hidden_size == base.model.get_input_embeddings().embedding_dim
    assert shape.vocab_size == VOCAB
    assert base.runs.cache.bytes_per_block(16, base.dtype) == 0


@pytest.mark.parametrize(
    ("family", "task", "path", "stream"),
    [
        ("bert", "SEQ_CLS", "bert.encoder.layer.0.attention.self.query", Stream.SOURCE),
        ("bert", "SEQ_CLS", "bert.pooler.dense", Stream.HEAD),
        ("bert", "SEQ_CLS", "classifier", Stream.HEAD),
        ("bert", "FEATURE_EXTRACTION", "pooler.dense", Stream.HEAD),
        ("bert", "FEATURE_EXTRACTION", "embeddings.word_embeddings", Stream.SOURCE),
        ("roberta", "SEQ_CLS", "classifier.out_proj", Stream.HEAD),
        ("distilbert", "SEQ_CLS", "pre_classifier", Stream.HEAD),
        ("deberta-v2", "SEQ_CLS", "pooler.dense", Stream.HEAD),
        ("deberta-v2", "SEQ_CLS", "deberta.encoder.LayerNorm", Stream.POSITIONS),
        ("deberta-v2-conv", "FEATURE_EXTRACTION", "encoder.layer.1.attention.self.pos_key_proj", Stream.POSITIONS),
        ("deberta-v2", "FEATURE_EXTRACTION", "encoder.layer.1.attention.self.key_proj", Stream.SOURCE),
    ],
)
def test_streams(family: str, task: str, path: str, stream: Stream) -> None:
    base = ResidentBase(tiny_encoder(family, task), name=family)
    assert path in base.sites
    assert base.runs.stream_of(path) is stream
    assert (path in base.beside_body) == (stream is Stream.HEAD)


def test_relative_embeddings_are_no_site() -> None:
    base = ResidentBase(tiny_encoder("deberta-v2"), name="deberta")
    tables = [path for path, spec in base.sites.items() if spec.kind is SiteKind.EMBEDDING]
    assert tables == ["embeddings.word_embeddings"]


def test_a_prefix_in_front_is_read_by_the_rows_of_its_adapter_alone() -> None:
    model = tiny_encoder("bert")
    base = ResidentBase(model, name="bert")
    generator = torch.Generator().manual_seed(4)
    keys, values = (torch.randn(2, 4, 3, 8, generator=generator) for _ in range(2))
    adapters = {
        name: Adapter(id=name, method="PREFIX_TUNING", prefix=KVPrefix(keys, values, advances))
        for name, advances in ((AdapterId("advancing"), True), (AdapterId("standing"), False))
    }
    make = random.Random(5)
    prompts = [tuple(make.randrange(5, VOCAB) for _ in range(make.randint(1, 9))) for _ in range(9)]
    names = [BASE, *adapters]
    wishes = [Wish(Reading.LAST, prompt, adapter=names[i % 3]) for i, prompt in enumerate(prompts)]
    driver = ReadingDriver(base, adapters)
    fast = driver.read(wishes)
    base.runs.attention.is_reference = True
    slow = driver.read(wishes)
    for wish, rows, truth in zip(wishes, fast, slow, strict=True):
        torch.testing.assert_close(torch.tensor(rows), torch.tensor(truth), rtol=1e-5, atol=1e-5)
        if wish.adapter == BASE:
            torch.testing.assert_close(torch.tensor(rows), states_of(tiny_encoder("bert"), wish)[-1:])
    same_prompt = [Wish(Reading.LAST, prompts[0], adapter=name) for name in names]
    plain, advancing, standing = (torch.tensor(rows) for rows in driver.read(same_prompt))
    assert not torch.allclose(plain, standing, atol=1e-2)
    assert not torch.allclose(advancing, standing, atol=1e-2)
