"""Tiny random encoders of every family, as the classes of their tasks, with weights that leave no ties."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

VOCAB = 97
HIDDEN = 32


def _bert_like(**more: Any) -> dict[str, Any]:
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2}
    return {**sizes, "num_attention_heads": 4, "max_position_embeddings": 64, "type_vocab_size": 2, **more}


def _deberta(**more: Any) -> transformers.DebertaV2Config:
    """As in the published v3 models: shared projections, log buckets, a norm on relative positions, no positions."""
    return transformers.DebertaV2Config(
        **_bert_like(type_vocab_size=0),
        relative_attention=True,
        position_buckets=8,
        max_relative_positions=32,
        norm_rel_ebd="layer_norm",
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        **{"share_att_key": True, **more},
    )


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: transformers.BertConfig(**_bert_like()),
    "roberta": lambda: transformers.RobertaConfig(**_bert_like(type_vocab_size=1)),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**_bert_like(type_vocab_size=1)),
    "camembert": lambda: transformers.CamembertConfig(**_bert_like(type_vocab_size=1)),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=VOCAB, dim=HIDDEN, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64
    ),
    "electra": lambda: transformers.ElectraConfig(**_bert_like(embedding_size=24)),
    "deberta-v2": _deberta,
    "deberta-v2-conv": lambda: _deberta(share_att_key=False, conv_kernel_size=3, conv_act="gelu"),
}

TASKS = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}


def tiny_encoder(
    family: str, task: str = "FEATURE_EXTRACTION", *, seed: int = 0, num_labels: int = 2
) -> PreTrainedModel:
    """A model in eval mode with the library's plain attention.

    The body's weights follow from the seed alone, whatever the task; those of a head from the task too.
    """
    return copy.deepcopy(_made(family, task, seed, num_labels))


@cache
def _made(family: str, task: str, seed: int, num_labels: int) -> PreTrainedModel:
    config = CONFIGS[family]()
    config.num_labels = num_labels
    return enlivened(TASKS[task].from_config(config, attn_implementation="eager"), seed)


def enlivened(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The model with weights that make every layer count, the same ones for every class around one body."""
    body = model.base_model
    in_body = {id(p) for p in body.parameters()}
    parts = (
        [(path, p) for path, p in body.named_parameters() if not path.startswith("pooler.")],
        [(path, p) for path, p in body.named_parameters() if path.startswith("pooler.")],
        [(path, p) for path, p in model.named_parameters() if id(p) not in in_body],
    )
    for number, part in enumerate(parts):
        generator = torch.Generator().manual_seed(seed + number)
        for path, parameter in sorted(part):
            is_gain = parameter.dim() == 1 and path.endswith("weight")
            values = torch.randn(parameter.shape, generator=generator) * (0.25 if is_gain else 0.3)
            parameter.data = values + (1.0 if is_gain else 0.0)
    return model.eval().requires_grad_(False)
