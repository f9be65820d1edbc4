"""Checkpoints for reading, made by peft on tiny random models, and what peft itself reads with them."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch
from transformers import PreTrainedModel

from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.primitives import Adapter
from peft_serve.adapters.records import CheckpointFiles, Summary
from peft_serve.core import Reading
from peft_serve.model.base import ResidentBase
from tests.adapters.checkpoints import save

READING_OF = {"SEQ_CLS": Reading.SEQUENCE, "TOKEN_CLS": Reading.TOKENS, "QUESTION_ANS": Reading.SPANS}


def adapted(model: PreTrainedModel, config: peft.PeftConfig, seed: int = 0) -> Any:
    """A peft model with random values in everything that is trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.2 * torch.randn(parameter.shape, generator=generator)
    return made.eval()


def files_of(model: Any) -> CheckpointFiles:
    return save(model)


def compiled(files: CheckpointFiles, base: ResidentBase) -> tuple[Adapter, Summary]:
    """Through the gate and the compiler, as an upload goes."""
    limits = GateLimits()
    inspected = inspect(files, base, limits)
    return compile_adapter(inspected, base, limits), inspected.summary


@torch.no_grad()
def own_logits(model: Any, prompt: tuple[int, ...], segments: tuple[int, ...] = ()) -> torch.Tensor:
    """What the model itself gives for one prompt: [1, L], or [tokens, L] of the prompt's own tokens."""
    ids = torch.tensor([prompt])
    more = {"token_type_ids": torch.tensor([segments])} if segments else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    is_span = "start_logits" in out
    logits = torch.stack((out.start_logits[0], out.end_logits[0]), dim=-1) if is_span else out.logits[0]
    return logits[None] if logits.ndim == 1 else logits[-len(prompt) :]


@torch.no_grad()
def own_states(model: Any, prompt: tuple[int, ...]) -> torch.Tensor:
    """The last hidden states of a model without a head: those of a soft prompt in front, as peft has them."""
    ids = torch.tensor([prompt])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
