"""Bases that generate nothing, from folders: with the head they were saved with, or as a body alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from peft_serve.adapters.heads import own_facts
from peft_serve.adapters.records import HeadFacts
from peft_serve.model.base import ResidentBase
from peft_serve.model.loader import NotServable, load_base
from tests.model.tiny_encoders import CONFIGS, HIDDEN, VOCAB, enlivened, tiny_encoder


def loaded(model: PreTrainedModel, folder: Path) -> ResidentBase:
    model.save_pretrained(folder)
    return load_base(str(folder), dtype="float32", device="cpu")


@pytest.mark.parametrize("family", CONFIGS)
def test_a_classifier_is_loaded_with_its_head_and_labels(family: str, tmp_path: Path) -> None:
    model = tiny_encoder(family, "SEQ_CLS", num_labels=3)
    model.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    base = loaded(model, tmp_path)
    assert base.class_name == type(model).__name__
    assert base.shape.is_encoder
    assert own_facts(base) == HeadFacts("SEQ_CLS", 3)
    assert base.labels == ("no", "maybe", "yes")
    assert all(torch.equal(p, model.state_dict()[path]) for path, p in base.model.named_parameters())


@pytest.mark.parametrize(("task", "num_labels"), [("TOKEN_CLS", 5), ("QUESTION_ANS", 2)])
def test_other_heads_are_loaded_too(task: str, num_labels: int, tmp_path: Path) -> None:
    base = loaded(tiny_encoder("electra", task, num_labels=num_labels), tmp_path)
    assert own_facts(base) == HeadFacts(task, num_labels)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "deberta-v2"])
def test_a_model_that_fills_masks_is_loaded_as_its_body(family: str, tmp_path: Path) -> None:
    model = enlivened(transformers.AutoModelForMaskedLM.from_config(CONFIGS[family](), attn_implementation="eager"))
    base = loaded(model, tmp_path)
    assert base.model is base.model.base_model
    assert own_facts(base) is None
    assert base.labels == ()
    own = model.base_model.state_dict()
    assert all(torch.equal(p, own[path]) for path, p in base.model.named_parameters())
    assert not any("pooler" in path for path in base.sites), "a pooler that was never trained is of no use"


def test_a_body_with_a_pooler_keeps_it(tmp_path: Path) -> None:
    assert "pooler.dense" in loaded(tiny_encoder("bert"), tmp_path).sites


def _llama(wrap: type, **more: object) -> PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        **more,
    )
    return enlivened(wrap(config))


def test_a_decoder_with_a_head_is_loaded_to_be_read(tmp_path: Path) -> None:
    base = loaded(_llama(transformers.LlamaForSequenceClassification, num_labels=4), tmp_path)
    assert not base.shape.generates
    assert not base.shape.is_encoder
    assert own_facts(base) == HeadFacts("SEQ_CLS", 4)
    assert base.runs.cache.num_layers == 2


def test_a_bare_decoder_is_loaded_to_be_read(tmp_path: Path) -> None:
    base = loaded(_llama(transformers.LlamaModel), tmp_path)
    assert not base.shape.generates
    assert own_facts(base) is None
    assert base.beside_body == frozenset()


def test_a_decoder_with_a_language_model_head_generates(tmp_path: Path) -> None:
    base = loaded(_llama(transformers.LlamaForCausalLM), tmp_path)
    assert base.shape.generates
    assert base.beside_body == {"lm_head"}


def test_a_bert_that_was_made_a_decoder_is_not_served_as_an_encoder(tmp_path: Path) -> None:
    config = CONFIGS["bert"]()
    config.is_decoder = True
    with pytest.raises(NotServable):
        loaded(enlivened(transformers.BertLMHeadModel(config)), tmp_path)


def test_an_encoder_that_looks_through_windows_is_refused(tmp_path: Path) -> None:
    config = transformers.ModernBertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        **{f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")},
    )
    with pytest.raises(NotServable, match="window"):
        loaded(transformers.ModernBertForMaskedLM(config).eval(), tmp_path)
