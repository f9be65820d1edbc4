"""Writes a tiny random BERT and two LoRA adapters with heads into a folder; the server's Python runs it.

The clients' environment has no torch: the oldest of them cannot stand beside the server's own requirements.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = "where is my order anna lives in new york the parcel came on monday and what ? ."
HEADS = {
    "moods": ("AutoModelForSequenceClassification", "SEQ_CLS", ["sad", "glad", "mad"]),
    "names": ("AutoModelForTokenClassification", "TOKEN_CLS", ["O", "B-PER", "I-PER", "B-LOC"]),
}


def tokenizer() -> Any:
    vocab = {piece: i for i, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split(" ")])}
    made = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    specials = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **specials)


def write(root: Path) -> None:
    torch.manual_seed(0)
    words = tokenizer()
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    transformers.BertModel(config).save_pretrained(root / "tiny-bert")
    words.save_pretrained(root / "tiny-bert")
    for name, (auto, task, labels) in HEADS.items():
        own = transformers.BertConfig.from_pretrained(root / "tiny-bert", num_labels=len(labels))
        model = getattr(transformers, auto).from_config(own)
        lora = peft.LoraConfig(task_type=task, target_modules=["query", "value"], r=4, init_lora_weights=False)
        tuned = peft.get_peft_model(model, lora)
        tuned.save_pretrained(root / "adapters" / name)
        profile = '{"labels": ["' + '", "'.join(labels) + '"]}'
        (root / "adapters" / name / "peft_serve.json").write_text(profile)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
