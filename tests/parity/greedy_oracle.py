"""Greedy answers as peft (or transformers) gives them, and the quick way to see that given answers are those.

`generate` needs a pass for every token. Whether an answer is the greedy one is told by one pass over the prompt and the
answer: where each token is by far the most likely one after those before it, `generate` draws the very same, one after
the other. Where that one pass leaves any doubt, `generate` is asked.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Final

import peft
import torch

from tests.adapters.checkpoints import first_task

EOS: Final = 1
_PAD: Final = 0
_CLEAR: Final = 1e-4
"""Of the largest logit: by so much it must stand above the second, or rounding decides; a pass with cached keys and
values differs from one without by a hundredth of it."""


def greedy(model: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]], *, num_new: int) -> list[list[int]]:
    """The greedy answers to prompts of one length, of up to `num_new` tokens. `answers` are what is believed of them:
    the more of them are right, the sooner it is done; nothing else depends on them."""
    if not _generates_otherwise(model):
        chosen = _chosen(model, prompts, answers, num_new)
        if chosen == list(answers):
            return chosen
    return generated(model, prompts, num_new=num_new)


@torch.no_grad()
def generated(model: Any, prompts: Sequence[list[int]], *, num_new: int) -> list[list[int]]:
    """What `generate` gives: the end-of-sequence id included, prompt and start left out."""
    ids = torch.tensor(prompts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new,
            do_sample=False,
            num_beams=1,
            eos_token_id=EOS,
            pad_token_id=_PAD,
            **_tasks(model, len(ids)),
        )[:, 1 if model.config.is_encoder_decoder else ids.shape[1] :].tolist()
    return [_ended(new) for new in made]


@torch.no_grad()
def _chosen(
    model: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]], num_new: int
) -> list[list[int]] | None:
    """The most likely token at each place of the answers and behind them, up to where an answer ends; None where one of
    these is not clear."""
    longest = max(map(len, answers))
    padded = torch.tensor([[*answer, *[_PAD] * (longest - len(answer))] for answer in answers], dtype=torch.long)
    ids = torch.tensor(prompts)
    if model.config.is_encoder_decoder:
        start = torch.full((len(ids), 1), model.generation_config.decoder_start_token_id or _start_of(model))
        given = {"input_ids": ids, "decoder_input_ids": torch.cat((start, padded), dim=1)}
    else:
        given = {"input_ids": torch.cat((ids, padded), dim=1)}
    mask = torch.ones_like(given["input_ids"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits_BTV = model(**given, attention_mask=mask, **_tasks(model, len(ids))).logits[:, -longest - 1 :]
    best_BT2, ids_BT2 = logits_BTV.topk(2)
    is_clear_BT = best_BT2[..., 0] - best_BT2[..., 1] > _CLEAR * logits_BTV.abs().amax(dim=-1)
    forced = getattr(model.generation_config, "forced_eos_token_id", None)
    chosen = []
    for row, answer in enumerate(answers):
        new = _ended(ids_BT2[row, : min(len(answer) + 1, num_new), 0].tolist())
        if not is_clear_BT[row, : len(new)].all():
            return None
        if forced is not None and len(new) == num_new:  # BART's generation ends with this id wherever it is cut
            new[-1] = forced
        chosen.append(new)
    return chosen


def _start_of(model: Any) -> int:
    return int(model.config.decoder_start_token_id)


def _ended(new: list[int]) -> list[int]:
    return new[: new.index(EOS) + 1] if EOS in new else new


def _tasks(model: Any, num_rows: int) -> dict[str, torch.Tensor]:
    tasks = first_task(model) if isinstance(model, peft.PeftModel) else {}
    return {name: task.repeat(num_rows) for name, task in tasks.items()}


def _generates_otherwise(model: Any) -> bool:
    """Whether one pass of peft's over prompt and answer is not what its `generate` computes step by step: it would look
    for where an activated LoRA begins in the answer as well, and it puts soft prompts in front of the decoder's ids,
    where `generate` puts none."""
    if not isinstance(model, peft.PeftModel):
        return False
    config = model.peft_config["default"]
    is_activated = bool(getattr(config, "alora_invocation_tokens", None))
    return is_activated or (config.is_prompt_learning and model.config.is_encoder_decoder)
