"""The oracle of W13: what peft answers, one request at a time, with a base and one adapter and nothing else."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loadtest.trace import TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """The tokens of one answer, and for each by how much its logit exceeds the next best: a margin within rounding
    is a tie, which either side may break its own way."""

    tokens: tuple[int, ...]
    margins: tuple[float, ...]


def answers(base: Path, adapter: Path | None, requests: Iterable[TraceRequest]) -> Iterator[Truth]:
    """Greedy answers in float32, each exactly as long as asked for; `adapter` None is the base alone."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    for request in requests:
        ids = tokenizer(request.text, return_tensors="pt")["input_ids"]
        yield _answer(model, ids, request.max_new_tokens)


@torch.inference_mode()
def _answer(model: Any, ids: torch.Tensor, num_tokens: int) -> Truth:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about generation settings that are meant
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            eos_token_id=None,  # nothing ends an answer early, as with ignore_eos
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best = torch.stack([logits[0] for logits in made.logits]).topk(2, dim=-1).values
    return Truth(
        tokens=tuple(made.sequences[0, ids.shape[1] :].tolist()),
        margins=tuple((best[:, 0] - best[:, 1]).tolist()),
    )
