"""Bases: random-weight models to load-test on a machine without downloads.

They have the shape, and so the cost, of real small models; what they say is noise. Norms and scales are drawn
wide enough that the greedy choice is not a near tie, so that tokens can be compared between servers.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from loadtest.vocabulary import END, PAD, make_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a decoder with tied embeddings and heads of 64, Qwen2's or Llama's."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    max_context: int = 2048
    is_llama: bool = False  # without biases, and known to AdapterHub, whose bottlenecks Qwen2 has no place for

    def config(self) -> PreTrainedConfig:
        """The model's config."""
        return (LlamaConfig if self.is_llama else Qwen2Config)(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.max_context,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )


def shapes() -> dict[str, Shape]:
    """The shapes by name; ``tiny`` is for tests, ``-llama`` behind a name asks for Llama's architecture."""
    qwen2 = {
        "tiny": Shape(hidden=128, layers=2, heads=2, kv_heads=1, ffn=256, vocabulary=1024),
        "0.1b": Shape(hidden=640, layers=12, heads=10, kv_heads=2, ffn=2560, vocabulary=16000),
        "0.5b": Shape(hidden=896, layers=24, heads=14, kv_heads=2, ffn=4864, vocabulary=32000),
    }
    return qwen2 | {f"{name}-llama": replace(shape, is_llama=True) for name, shape in qwen2.items()}


def make_base(shape: Shape, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Save a random model of this shape with its tokenizer into `folder`, and answer with the folder."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(shape.config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, shape.hidden**-0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(shape.vocabulary), eos_token=END, pad_token=PAD)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.to(dtype).save_pretrained(folder)  # last: the folder counts as made once config and weights are there
    return folder


def ensure_base(name: str, work: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """The folder of a base: `name` is a folder that exists, or a shape, which is made under `work` if need be."""
    known = shapes()
    if name not in known:
        folder = Path(name)
        if not (folder / "config.json").exists():
            raise ValueError(f"base {name!r} is neither a model folder nor one of {', '.join(known)}")
        return folder
    suffix = "" if dtype is torch.float32 else f"-{str(dtype).removeprefix('torch.')}"
    folder = work / f"base-{name}{suffix}"
    if not any(folder.glob("*.safetensors")):
        make_base(known[name], folder, dtype=dtype)
    return folder


def check_tokenizer(folder: Path, text: str) -> list[int]:
    """The ids of a text by the tokenizer saved in `folder`."""
    ids: list[int] = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    return ids
