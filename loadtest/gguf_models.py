"""The load test's random bases and LoRA adapters as GGUF files, so that llama.cpp can serve the very same weights.

llama.cpp's own converters know each model's tokenizer by a checksum, and a random base's is none of them; so these
files are written here: Qwen2 with a byte-level tokenizer, and plain LoRA for it. Any other model or adapter takes
llama.cpp's ``convert_hf_to_gguf.py`` and ``convert_lora_to_gguf.py``. Matrices are kept in the dtype asked for, norms
and biases in float32, as those converters do.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from loadtest.gguf_file import TENSOR_TYPES, Fact, GgufTensor, write_gguf

MODULES: Mapping[str, str] = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
AROUND: Mapping[str, str] = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = re.compile(r"(?:base_model\.model\.)?model\.layers\.(\d+)\.(.+?)\.(weight|bias|lora_[AB]\.weight)")
FILE_TYPES: Mapping[str, int] = {"float32": 0, "float16": 1, "bfloat16": 32}
NORMAL, CONTROL = 1, 3
"""llama.cpp's kinds of token: one that stands for text, and one that does not."""


def base_to_gguf(base: Path, path: Path, *, dtype: str = "float32") -> Path:
    """Write the Qwen2 model in folder `base` to the file `path`; ValueError for any other kind of model."""
    config = json.loads((base / "config.json").read_text())
    if config.get("model_type") != "qwen2":
        raise ValueError(
            f"{base} is a {config.get('model_type')!r} model, and only the load test's own bases (qwen2) are written "
            "as GGUF here; convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    facts = {"general.file_type": FILE_TYPES[dtype], **_sizes(config), **_vocabulary(base, config)}
    return write_gguf(path, _general(facts, base.name), list(_tensors(base, dtype)))


def adapter_to_gguf(folder: Path, path: Path, *, dtype: str = "float32") -> Path:
    """Write the LoRA adapter in `folder`, which was made for a Qwen2 base, to the file `path`; ValueError for
    anything that is not plain LoRA of one rank."""
    config = json.loads((folder / "adapter_config.json").read_text())
    odd = [
        name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "bias") if _is_set(config, name)
    ]
    if config.get("peft_type") != "LORA" or odd:
        said = f"sets {odd[0]}" if odd else f"is {config.get('peft_type')}"
        raise ValueError(f"{folder} {said}, and llama.cpp's server is given plain LoRA only; take --mixture lora:R")
    facts: dict[str, Fact] = {"adapter.type": "lora", "adapter.lora.alpha": float(config["lora_alpha"])}
    general = _general(facts, folder.name) | {"general.type": "adapter"}
    return write_gguf(path, general, list(_tensors(folder, dtype)))


def _is_set(config: Mapping[str, Any], name: str) -> bool:
    return config.get(name) not in (None, False, {}, "none")


def _general(facts: Mapping[str, Fact], name: str) -> dict[str, Fact]:
    return {"general.architecture": "qwen2", "general.name": name, **facts}


def _sizes(config: Mapping[str, Any]) -> dict[str, Fact]:
    rope = config.get("rope_parameters") or config
    return {
        "qwen2.block_count": config["num_hidden_layers"],
        "qwen2.context_length": config["max_position_embeddings"],
        "qwen2.embedding_length": config["hidden_size"],
        "qwen2.feed_forward_length": config["intermediate_size"],
        "qwen2.attention.head_count": config["num_attention_heads"],
        "qwen2.attention.head_count_kv": config["num_key_value_heads"],
        "qwen2.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "qwen2.rope.freq_base": float(rope.get("rope_theta", 10000.0)),
    }


def _vocabulary(base: Path, config: Mapping[str, Any]) -> dict[str, Fact]:
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    ids: dict[str, int] = tokenizer["model"]["vocab"]
    special = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    merges = tokenizer["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": sorted(ids, key=lambda token: ids[token]),
        "tokenizer.ggml.token_type": [CONTROL if number in special else NORMAL for number in sorted(ids.values())],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.padding_token_id": config["pad_token_id"],
        "tokenizer.ggml.add_bos_token": False,
    }


def _tensors(folder: Path, dtype: str) -> Iterator[GgufTensor]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118  # a file, not a dict
                yield _tensor(file, name, tuple(content.get_slice(name).get_shape()), dtype)


def _tensor(file: Path, name: str, shape: tuple[int, ...], dtype: str) -> GgufTensor:
    kept = dtype if len(shape) > 1 else "float32"
    assert kept in TENSOR_TYPES
    kind: torch.dtype = getattr(torch, kept)

    def read() -> bytes:
        with safe_open(file, framework="pt") as content:
            tensor = content.get_tensor(name).to(kind).contiguous()
        return bytes(tensor.view(torch.uint8).numpy().tobytes())

    size = torch.Size(shape).numel() * kind.itemsize
    return GgufTensor(name=_renamed(name), shape=shape, dtype=kept, num_bytes=size, read=read)


def _renamed(name: str) -> str:
    if name in AROUND:
        return AROUND[name]
    found = LAYER.fullmatch(name)
    if found is None or found[2] not in MODULES:
        raise ValueError(f"tensor {name!r} has no name in llama.cpp's Qwen2 that is known here")
    end = f"weight.{found[3][:6].lower()}" if found[3].startswith("lora") else found[3]
    return f"blk.{found[1]}.{MODULES[found[2]]}.{end}"
