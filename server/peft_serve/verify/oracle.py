"""What peft makes of an adapter, one prompt at a time, in float32: greedy tokens, a head's logits, hidden states.

It reads the text itself, with the base's tokenizer and the tokens that the adapter brings.
"""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from peft_serve.adapters.records import CONFIG_FILE, WEIGHTS_FILE, CheckpointFiles
from peft_serve.adapters.vocabulary import Vocabulary
from peft_serve.errors import BadRequest
from peft_serve.model.loader import locate
from peft_serve.verify.report import Answer, Rows
from peft_serve.verify.task import Task

_WITH_HEADS = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
}
_NOT_LOADED = "missing adapter keys"  # how peft's warning begins about tensors it has no place for


class Oracle:
    """A base with one adapter, run by transformers and peft alone.

    Raises `BadRequest` where peft is not installed or cannot load the adapter.
    """

    def __init__(self, model: str, files: CheckpointFiles, task: Task, vocabulary: Vocabulary) -> None:
        location = locate(model)
        base = _base(location, task)
        self._model = _adapted(base, files, model)
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(location, trust_remote_code=False)
        self._own_eos = _add(self._tokenizer, vocabulary)
        self._is_encoder_decoder = bool(base.config.is_encoder_decoder)
        self._knows_segments = "token_type_ids" in inspect.signature(base.forward).parameters

    @torch.no_grad()
    def answer(self, text: str, *, max_new_tokens: int, eos_ids: Sequence[int], task_id: int | None = None) -> Answer:
        """Greedy tokens after the prompt, an end-of-sequence id included."""
        prompt: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        ids = torch.tensor([prompt])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=[*eos_ids, *self._own_eos] or None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
                **_told(task_id),
            )
        start = 1 if self._is_encoder_decoder else len(prompt)
        tokens = made.sequences[0, start:].tolist()
        logprobs = [
            float(torch.log_softmax(logits[0].float(), dim=-1)[token])
            for token, logits in zip(tokens, made.logits, strict=False)
        ]
        return Answer(tokens=tuple(tokens), logprobs=tuple(logprobs))

    @torch.no_grad()
    def read(self, text: str, pair: str | None = None, *, task_id: int | None = None) -> Rows:
        """A head's logits of the text, or of each token (start and end for answers); else the mean hidden state."""
        given = dict(self._tokenizer(text, pair, return_tensors="pt", verbose=False))
        if not self._knows_segments:
            given.pop("token_type_ids", None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = self._model(**given, **_told(task_id))
        num_tokens = given["input_ids"].shape[1]  # peft puts what stands for a soft prompt in front of them
        if "start_logits" in out:
            values = torch.stack((out.start_logits[0], out.end_logits[0]), dim=-1)[-num_tokens:]
        elif "logits" in out:
            values = out.logits[0][None] if out.logits.ndim == 2 else out.logits[0, -num_tokens:]
        else:
            values = out.last_hidden_state[0, -num_tokens:].mean(dim=0, keepdim=True)
        return tuple(tuple(row) for row in values.float().tolist())


def _told(task_id: int | None) -> dict[str, Any]:
    return {} if task_id is None else {"task_ids": torch.tensor([task_id])}


def _base(location: str, task: Task) -> Any:
    config = transformers.AutoConfig.from_pretrained(location, trust_remote_code=False)
    more: dict[str, Any] = {}
    auto: Any
    if task.head is not None:
        auto = _WITH_HEADS[task.head.task]
        more = {"num_labels": task.head.num_labels, "ignore_mismatched_sizes": True}  # the head is the adapter's
    elif not task.is_text:
        auto = transformers.AutoModel
    else:
        auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    return auto.from_pretrained(location, dtype=torch.float32, use_safetensors=True, **more).eval()


def _adapted(base: Any, files: CheckpointFiles, model: str) -> Any:
    try:
        import peft
    except ImportError:
        raise BadRequest("peft is not installed; install it with: pip install 'peft-serve[verify]'") from None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")  # all but one are about configs on the hub and tied weights
        (Path(folder) / CONFIG_FILE).write_bytes(files.config)
        (Path(folder) / WEIGHTS_FILE).write_bytes(files.weights)
        try:
            adapted = peft.PeftModel.from_pretrained(base, folder).eval()
        except Exception as error:  # whatever peft raises is the answer to the user's question
            raise BadRequest(f"peft itself cannot load this adapter on {model}: {error}") from error
    if any(_NOT_LOADED in str(warning.message) for warning in said):
        raise BadRequest(
            f"peft finds no place for the adapter's tensors in the {type(base).__name__} that {model} is for its task; "
            "it was trained on a model of another class, and its config's task_type does not say so"
        )
    return adapted


def _add(tokenizer: Any, vocabulary: Vocabulary) -> list[int]:
    """Teach the base's tokenizer the adapter's tokens, as training did; gives the ids that end an answer."""
    known = tokenizer.get_vocab()
    new = sorted((text for text in vocabulary.added if text not in known), key=vocabulary.added.__getitem__)
    for text in new:
        flags = dict.fromkeys(vocabulary.traits.get(text, ()), True)
        special = text in vocabulary.special
        token = transformers.AddedToken(text, **{"normalized": False, **flags, "special": special})
        tokenizer.add_tokens([token], special_tokens=special)
    eos = vocabulary.names.get("eos_token")
    return [vocabulary.added[eos]] if eos in new else []
