"""The check at start: models that read are measured too, and one that reads wrongly is found out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from peft_serve.model.base import ResidentBase
from peft_serve.model.loader import NotServable, wrap
from peft_serve.model.self_check import difference, probe
from tests.model.tiny_encoders import CONFIGS, TASKS, enlivened, tiny_encoder


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", CONFIGS)
def test_encoders_agree_with_themselves(family: str, task: str) -> None:
    model = tiny_encoder(family, task)
    probes = probe(model)
    assert {len(given.tokens) for given in probes} == {11, 6}
    assert difference(ResidentBase(model, name=family), probes) < 1e-5


def test_types_of_tokens_are_part_of_the_check() -> None:
    assert all(any(given.segments) for given in probe(tiny_encoder("bert")))
    assert not any(given.segments for given in probe(tiny_encoder("roberta")))


@pytest.mark.parametrize("name", ["AutoModel", "AutoModelForSequenceClassification"])
def test_a_decoder_that_generates_nothing_is_measured_by_its_states(name: str) -> None:
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0)
    model = enlivened(getattr(transformers, name).from_config(config, attn_implementation="eager"))
    probes = probe(model)
    assert probes[0].own_TX.shape == (11, 32)
    assert difference(ResidentBase(model, name="gpt2"), probes) < 1e-5


def test_an_encoder_whose_positions_are_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_encoder("bert")
    forward: Any = model.embeddings.forward

    def shifted(*args: Any, position_ids: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        moved = None if position_ids is None else position_ids + 1
        given: torch.Tensor = forward(*args, position_ids=moved, **kwargs)
        return given

    monkeypatch.setattr(model.embeddings, "forward", shifted)
    with pytest.raises(NotServable, match="differ by"):
        wrap(model, name="shifted")
