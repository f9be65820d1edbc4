"""What peft makes of an adapter: greedy tokens and their log-probabilities, one prompt at a time, in float32."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peft_serve.adapters.records import CONFIG_FILE, WEIGHTS_FILE, CheckpointFiles
from peft_serve.errors import BadRequest
from peft_serve.model.loader import locate
from peft_serve.verify.report import Answer


class Oracle:
    """A base with one adapter, run by transformers and peft alone.

    Raises `BadRequest` where peft is not installed or cannot load the adapter.
    """

    def __init__(self, model: str, files: CheckpointFiles) -> None:
        try:
            import peft
        except ImportError:
            raise BadRequest("peft is not installed; install it with: pip install 'peft-serve[verify]'") from None
        base = _base(locate(model))
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about configs on the hub and tied weights
            (Path(folder) / CONFIG_FILE).write_bytes(files.config)
            (Path(folder) / WEIGHTS_FILE).write_bytes(files.weights)
            try:
                self._model: Any = peft.PeftModel.from_pretrained(base, folder).eval()
            except Exception as error:  # whatever peft raises is the answer to the user's question
                raise BadRequest(f"peft itself cannot load this adapter on {model}: {error}") from error
        self._is_encoder_decoder = bool(base.config.is_encoder_decoder)

    @torch.no_grad()
    def answer(
        self, prompt: Sequence[int], *, max_new_tokens: int, eos_ids: Sequence[int], task_id: int | None = None
    ) -> Answer:
        """Greedy tokens after the prompt, an end-of-sequence id included."""
        task = {} if task_id is None else {"task_ids": torch.tensor([task_id])}
        ids = torch.tensor([list(prompt)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=list(eos_ids) or None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
                **task,
            )
        start = 1 if self._is_encoder_decoder else len(prompt)
        tokens = made.sequences[0, start:].tolist()
        logprobs = [
            float(torch.log_softmax(logits[0].float(), dim=-1)[token])
            for token, logits in zip(tokens, made.logits, strict=False)
        ]
        return Answer(tokens=tuple(tokens), logprobs=tuple(logprobs))


def _base(location: str) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(location)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    return auto.from_pretrained(location, dtype=torch.float32, use_safetensors=True).eval()


def generates(files: CheckpointFiles) -> bool:
    """Whether peft has the adapter's method and it is for text generation, which is what this oracle runs."""
    config = json.loads(files.config)
    return "peft_type" in config and config.get("task_type") in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM")
