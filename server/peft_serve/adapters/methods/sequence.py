"""Methods that stand in front of the sequence: soft prompts and key/value prefixes.

peft evaluates prompt encoders and prefix projections when it saves, so the file always holds the final values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import BaseShape
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.methods.fields import disagreement
from peft_serve.adapters.primitives import KVPrefix, SoftPrompt
from peft_serve.adapters.records import CONFIG_FILE
from peft_serve.adapters.registry import TASK_FIELD, Sequence, Shape, prepends
from peft_serve.errors import AdapterInvalid, Refusal

KEY: Final = "prompt_embeddings"
COLUMNS: Final = "prefix_task_cols"
ROWS: Final = "prefix_task_rows"
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
MULTITASK: Final = ConfigSchema(
    required={"num_virtual_tokens": SIZE},
    optional={**SIZES, "num_tasks": SIZE, "num_ranks": SIZE},
    inert=frozenset(
        {
            "prompt_tuning_init",
            "prompt_tuning_init_text",
            "prompt_tuning_init_state_dict_path",  # a path on the machine of training, which is never followed
            "prompt_tuning_init_task",
            "tokenizer_name_or_path",
            "tokenizer_kwargs",
        }
    ),
)
CPT: Final = ConfigSchema(
    required={"num_virtual_tokens": SIZE},
    optional=SIZES,
    inert=frozenset(
        {
            "cpt_token_ids",
            "cpt_mask",
            "cpt_tokens_type_mask",
            "opt_weighted_loss_type",
            "opt_loss_decay_factor",
            "opt_projection_epsilon",
            "opt_projection_format_epsilon",
            "tokenizer_name_or_path",
        }
    ),
)
CARTRIDGE: Final = ConfigSchema(
    required={"num_virtual_tokens": SIZE}, optional=SIZES, inert=frozenset({"num_frozen_tokens"})
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
    if not _fits_task(config.text("task_type"), base):
        kind = "an encoder-decoder" if base.is_encoder_decoder else "an encoder" if base.is_encoder else "decoder-only"
        reason = f"is {config.text('task_type')} and the served base is {kind}; serve it on the base it was trained on"
        refusals.append(Refusal(f"{CONFIG_FILE}: task_type", reason))
    if refusals:
        raise AdapterInvalid(refusals)


def _fits_task(task: str, base: BaseShape) -> bool:
    """An encoder-decoder serves text alone; tasks of heads and hidden states go with any other base."""
    if not task or base.is_encoder_decoder:
        return task in ("", "SEQ_2_SEQ_LM")
    return task != "SEQ_2_SEQ_LM" and not (task == "CAUSAL_LM" and base.is_encoder)


def _prompt_layout(config: Config, base: BaseShape) -> Mapping[str, Shape]:
    _check(config, base, {"token_dim": base.hidden_size})
    num_rows = config.integer("num_virtual_tokens") * _num_submodules(config, base)
    return {KEY: (num_rows, base.hidden_size)}


def _multitask_layout(config: Config, base: BaseShape) -> Mapping[str, Shape]:
    layout = dict(_prompt_layout(config, base))
    num_rows, width = layout[KEY]
    num_tasks, rank = config.integer("num_tasks", 1), config.integer("num_ranks", 1)
    return {**layout, COLUMNS: (num_tasks, num_rows, rank), ROWS: (num_tasks, rank, width)}


def _context_layout(config: Config, base: BaseShape) -> Mapping[str, Shape]:
    if base.is_encoder_decoder or base.is_encoder or config.text("task_type", "CAUSAL_LM") != "CAUSAL_LM":
        reason = f"CPT is for CAUSAL_LM on a decoder-only base, not {config.text('task_type')}; use PROMPT_TUNING"
        raise AdapterInvalid([Refusal(f"{CONFIG_FILE}: task_type", reason)])
    return _prompt_layout(config, base)


def _num_tasks(config: Config) -> int:
    return config.integer("num_tasks", 1)


def _prefix_layout(config: Config, base: BaseShape) -> Mapping[str, Shape]:
    width = base.num_kv_heads * base.head_dim
    expected = {"num_layers": base.num_layers, "num_attention_heads": base.num_kv_heads, "token_dim": width}
    _check(config, base, expected)
    return {KEY: (config.integer("num_virtual_tokens"), 2 * base.num_layers * width)}


def _soft_prompt(sequence: Sequence) -> SoftPrompt:
    return _first_rows(sequence, sequence.tensors[KEY])


def _first_rows(sequence: Sequence, rows_PD: Tensor) -> SoftPrompt:
    # A file for an encoder-decoder holds as many rows again for the decoder, which nothing ever reads.
    return SoftPrompt(rows_PD[: sequence.config.integer("num_virtual_tokens")])


@prepends("PROMPT_TUNING", schema=PROMPT_TUNING, layout=_prompt_layout)
def prompt_tuning(sequence: Sequence) -> SoftPrompt:
    """Trained embeddings in front of the tokens (arXiv:2104.08691, peft `PromptEmbedding`)."""
    return _soft_prompt(sequence)


@prepends("P_TUNING", schema=P_TUNING, layout=_prompt_layout)
def p_tuning(sequence: Sequence) -> SoftPrompt:
    """Embeddings that an encoder produced when the checkpoint was saved (arXiv:2103.10385, peft `PromptEncoder`)."""
    return _soft_prompt(sequence)


@prepends("MULTITASK_PROMPT_TUNING", schema=MULTITASK, layout=_multitask_layout, num_tasks=_num_tasks)
def multitask_prompt_tuning(sequence: Sequence) -> SoftPrompt:
    """Embeddings that all tasks share, times a low-rank matrix of the task's own (arXiv:2303.02861, peft
    `MultitaskPromptEmbedding`)."""
    task, num_tasks = sequence.config.integer(TASK_FIELD, 0), _num_tasks(sequence.config)
    if not 0 <= task < num_tasks:
        raise disagreement(TASK_FIELD, f"is {task}; the adapter has tasks 0 ... {num_tasks - 1}")
    own_PD = sequence.tensors[COLUMNS][task] @ sequence.tensors[ROWS][task]
    return _first_rows(sequence, sequence.tensors[KEY] * own_PD)


@prepends("CPT", schema=CPT, layout=_context_layout)
def cpt(sequence: Sequence) -> SoftPrompt:
    """Embeddings of example tokens, moved a little; the file holds the sum (arXiv:2410.17222, peft `CPTEmbedding`)."""
    return _soft_prompt(sequence)


@prepends("PREFIX_TUNING", schema=PREFIX_TUNING, layout=_prefix_layout)
def prefix_tuning(sequence: Sequence) -> KVPrefix:
    """Keys and values in front of the self-attention cache (arXiv:2101.00190, peft `PeftModel.get_prompt`)."""
    return _kv_prefix(sequence)


@prepends("CARTRIDGE", schema=CARTRIDGE, layout=_prefix_layout)
def cartridge(sequence: Sequence) -> KVPrefix:
    """A prefix as in prefix tuning, that began as the cache of a text (arXiv:2506.06266, peft `CartridgeEncoder`)."""
    return _kv_prefix(sequence)


def _kv_prefix(sequence: Sequence) -> KVPrefix:
    """Keys and values of each layer from rows of the file, as peft deals them out.

    A row holds 2 L vectors, key and value of each layer in turn. With two submodules peft doubles that list and
    deals it out in fours, so that layer l gets vectors 4 l and 4 l + 1, counted around; the same is done here.
    """
    base = sequence.base
    rows = sequence.tensors[KEY]
    kv_NHPD = rows.view(rows.shape[0], 2 * base.num_layers, base.num_kv_heads, base.head_dim).permute(1, 2, 0, 3)
    stride = 2 * _num_submodules(sequence.config, base)
    first = torch.arange(base.num_layers) * stride % (2 * base.num_layers)
    return KVPrefix(kv_NHPD[first], kv_NHPD[first + 1])
