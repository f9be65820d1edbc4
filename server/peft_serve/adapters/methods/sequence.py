"""Methods that stand in front of the sequence: soft prompts and key/value prefixes.

peft evaluates prompt encoders and prefix projections when it saves, so the file always holds the final values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import BaseShape
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.primitives import KVPrefix, SoftPrompt
from peft_serve.adapters.records import CONFIG_FILE
from peft_serve.adapters.registry import Sequence, Shape, prepends
from peft_serve.errors import AdapterInvalid, Refusal

KEY: Final = "prompt_embeddings"
SIZE: Final = rules.integer(1, 1 << 20)

SIZES: Final = {
    "token_dim": SIZE,
    "num_layers": SIZE,
    "num_attention_heads": SIZE,
    "num_transformer_submodules": rules.integer(1, 2),
}
PROMPT_TUNING: Final = ConfigSchema(
    required={"num_virtual_tokens": SIZE},
    optional=SIZES,
    inert=frozenset({"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}),
)
P_TUNING: Final = ConfigSchema(
    required={"num_virtual_tokens": SIZE},
    optional=SIZES,
    inert=frozenset(
        {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"}
    ),
)
PREFIX_TUNING: Final = ConfigSchema(
    required={"num_virtual_tokens": SIZE},
    optional=SIZES,
    inert=frozenset({"encoder_hidden_size", "prefix_projection", "init_weights"}),
)


def _num_submodules(config: Config, base: BaseShape) -> int:
    return config.integer("num_transformer_submodules", 2 if base.is_encoder_decoder else 1)


def _check(config: Config, base: BaseShape, expected: Mapping[str, int]) -> None:
    refusals = [
        Refusal(f"{CONFIG_FILE}: {name}", f"is {config.integer(name)}; the served base has {value}")
        for name, value in expected.items()
        if config.integer(name, value) != value
    ]
    if not base.is_encoder_decoder and _num_submodules(config, base) != 1:
        place = f"{CONFIG_FILE}: num_transformer_submodules"
        refusals.append(Refusal(place, "is 2 and the served base is decoder-only; serve it on its own base"))
    task = config.text("task_type")
    if task and (task == "SEQ_2_SEQ_LM") != base.is_encoder_decoder:
        kind = "an encoder-decoder" if base.is_encoder_decoder else "decoder-only"
        refusals.append(Refusal(f"{CONFIG_FILE}: task_type", f"is {task} and the served base is {kind}"))
    if refusals:
        raise AdapterInvalid(refusals)


def _prompt_layout(config: Config, base: BaseShape) -> Mapping[str, Shape]:
    _check(config, base, {"token_dim": base.hidden_size})
    num_rows = config.integer("num_virtual_tokens") * _num_submodules(config, base)
    return {KEY: (num_rows, base.hidden_size)}


def _prefix_layout(config: Config, base: BaseShape) -> Mapping[str, Shape]:
    width = base.num_kv_heads * base.head_dim
    expected = {"num_layers": base.num_layers, "num_attention_heads": base.num_kv_heads, "token_dim": width}
    _check(config, base, expected)
    return {KEY: (config.integer("num_virtual_tokens"), 2 * base.num_layers * width)}


def _soft_prompt(sequence: Sequence) -> SoftPrompt:
    # A file for an encoder-decoder holds as many rows again for the decoder, which nothing ever reads.
    return SoftPrompt(sequence.tensors[KEY][: sequence.config.integer("num_virtual_tokens")])


@prepends("PROMPT_TUNING", schema=PROMPT_TUNING, layout=_prompt_layout)
def prompt_tuning(sequence: Sequence) -> SoftPrompt:
    """Trained embeddings in front of the tokens (arXiv:2104.08691, peft `PromptEmbedding`)."""
    return _soft_prompt(sequence)


@prepends("P_TUNING", schema=P_TUNING, layout=_prompt_layout)
def p_tuning(sequence: Sequence) -> SoftPrompt:
    """Embeddings that an encoder produced when the checkpoint was saved (arXiv:2103.10385, peft `PromptEncoder`)."""
    return _soft_prompt(sequence)


@prepends("PREFIX_TUNING", schema=PREFIX_TUNING, layout=_prefix_layout)
def prefix_tuning(sequence: Sequence) -> KVPrefix:
    """Keys and values in front of the self-attention cache (arXiv:2101.00190, peft `PeftModel.get_prompt`).

    A row holds 2 L vectors, key and value of each layer in turn. With two submodules peft doubles that list and
    deals it out in fours, so that layer l gets vectors 4 l and 4 l + 1, counted around; the same is done here.
    """
    base = sequence.base
    rows = sequence.tensors[KEY]
    kv_NHPD = rows.view(rows.shape[0], 2 * base.num_layers, base.num_kv_heads, base.head_dim).permute(1, 2, 0, 3)
    stride = 2 * _num_submodules(sequence.config, base)
    first = torch.arange(base.num_layers) * stride % (2 * base.num_layers)
    return KVPrefix(kv_NHPD[first], kv_NHPD[first + 1])
