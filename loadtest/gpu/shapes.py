"""Large bases with random weights, made on the device itself: no file is written or read, and none fits a disk here.

They cost what models of their shape cost; what they say is noise. Weights are drawn small enough that activations stay
finite in bfloat16.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import transformers
from transformers import PreTrainedModel

from peft_serve.kernels.eight_bits import Code
from peft_serve.model.eight_bits import store_in_eight_bits


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape by name, and how its model is configured and classed. Equal names are equal shapes."""

    name: str
    kind: Any  # the model's class
    config: Callable[[], Any]
    dtype: torch.dtype = torch.bfloat16
    code: Code | None = None  # what its linear weights are stored as, if not in full

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shape) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


def make(shape: Shape, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """A model of this shape, in eval mode, its weights drawn on the device."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(device):
            model: PreTrainedModel = shape.kind(shape.config())
    finally:
        torch.set_default_dtype(before)
    model.eval().requires_grad_(False)
    if shape.code is None:
        return model.to(device)
    store_in_eight_bits(model, shape.code, device)
    return model


def quantised(shape: Shape, code: Code) -> Shape:
    """The same, its linear weights in 8 bits."""
    return replace(shape, name=f"{shape.name}, {code}", code=code)


def decoder(*, is_quick: bool) -> Shape:
    """Llama 3.1 8B (arXiv:2407.21783, table 3), or a toy."""
    return _TOY_DECODER if is_quick else _DECODER


def encoder_decoder(*, is_quick: bool) -> Shape:
    """T5 1.1 XL, which T0_3B is: 24 and 24 layers of 2,048 (arXiv:1910.10683), or a toy."""
    return _TOY_ENCODER_DECODER if is_quick else _ENCODER_DECODER


def encoder(*, is_quick: bool) -> Shape:
    """BERT-large: 24 layers of 1,024 (arXiv:1810.04805), or a toy."""
    return _TOY_ENCODER if is_quick else _ENCODER


def _llama(**sizes: int) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**sizes, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=0)


def _t5(**sizes: int) -> transformers.T5Config:
    return transformers.T5Config(
        **sizes,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )


_DECODER: Final = Shape(
    "8 B, Llama 3.1's shape",
    transformers.LlamaForCausalLM,
    lambda: _llama(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
)
_TOY_DECODER: Final = Shape(
    "toy decoder",
    transformers.LlamaForCausalLM,
    lambda: _llama(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    ),
    torch.float32,
)
_ENCODER_DECODER: Final = Shape(
    "T5 3 B's shape",
    transformers.T5ForConditionalGeneration,
    lambda: _t5(vocab_size=32128, d_model=2048, d_ff=5120, d_kv=64, num_layers=24, num_decoder_layers=24, num_heads=32),
)
_TOY_ENCODER_DECODER: Final = Shape(
    "toy encoder-decoder",
    transformers.T5ForConditionalGeneration,
    lambda: _t5(vocab_size=96, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_decoder_layers=2, num_heads=4),
    torch.float32,
)
_ENCODER: Final = Shape(
    "BERT-large's shape",
    transformers.BertModel,
    lambda: transformers.BertConfig(
        vocab_size=30522,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=512,
    ),
)
_TOY_ENCODER: Final = Shape(
    "toy encoder",
    transformers.BertModel,
    lambda: transformers.BertConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    ),
    torch.float32,
)
