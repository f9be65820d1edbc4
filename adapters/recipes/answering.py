"""How a model answers in one of a few given words, for training and for scoring.

The rule is the server's own: the score of a choice is the sum of the log-probabilities of **all** its tokens
after the prompt (no end-of-sequence token), and the best sum is the answer.

`AnswerModel` hides whether the base is a decoder or an encoder-decoder. Prompts in one call of `scores` have
equal length, so that nothing is padded and a row gets what it would get alone.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tasks import Row, Wording
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutput

MAX_TRAIN_TEXT_TOKENS = 100
IGNORED = -100
SCORED_IN_FULL = 12


def load_base(base: str) -> tuple[Any, Any]:
    """The base in fp32 and its tokenizer, from a folder or a hub name."""
    auto = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(base).is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(base, dtype=torch.float32), AutoTokenizer.from_pretrained(base)


def load_adapted(base: str, adapter: Path) -> tuple[Any, Any]:
    """The base with the PEFT checkpoint in the folder `adapter` on it, ready to score."""
    model, tokenizer = load_base(base)
    return PeftModel.from_pretrained(model, str(adapter)).eval(), tokenizer


class AnswerModel(ABC):
    """A PEFT model and its tokenizer, asked in one wording."""

    def __init__(self, model: Any, tokenizer: Any, wording: Wording) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.wording = wording
        self.labels = list(wording.choices)
        self.choices = [self.answer_ids(words) for words in wording.choices.values()]

    @staticmethod
    def of(model: Any, tokenizer: Any, wording: Wording) -> AnswerModel:
        kind = _EncoderDecoder if model.config.is_encoder_decoder else _Decoder
        return kind(model, tokenizer, wording)

    def answer_ids(self, words: str) -> list[int]:
        return list(self.tokenizer(words, add_special_tokens=False)["input_ids"])

    def prompt_ids(self, text: str, max_text_tokens: int | None = None) -> list[int]:
        """The prompt around `text` as one string's tokens, special ones included, as a server makes them."""
        if max_text_tokens is not None:
            text = self._cut(text, max_text_tokens)
        return list(self.tokenizer(self.wording.prompt(text))["input_ids"])

    def _cut(self, text: str, max_tokens: int) -> str:
        spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(spans) <= max_tokens else text[: spans[max_tokens - 1][1]]

    @property
    def base(self) -> Any:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @abstractmethod
    def loss(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> torch.Tensor:
        """Mean cross-entropy of the answers' tokens; the prompt's own tokens are not learned."""

    @abstractmethod
    def scores(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """Log-probability [prompt, choice] of every choice after every prompt; prompts of equal length."""


class _Decoder(AnswerModel):
    """A causal model. Pads stand on the right, where causal attention never looks."""

    def _embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings, behind the soft prompt if the method has one."""
        rows: torch.Tensor = self.base.get_input_embeddings()(ids)
        if isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning:
            soft = self.model.get_prompt(batch_size=ids.shape[0]).to(rows.dtype)
            rows = torch.cat([soft, rows], dim=1)
        return rows

    def loss(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> torch.Tensor:
        ids = _padded([p + a for p, a in zip(prompts, answers, strict=True)], self.tokenizer.pad_token_id)
        embedded = self._embedded(ids)
        num_soft = embedded.shape[1] - ids.shape[1]
        hidden = self.base.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        where = [
            (row, num_soft + len(prompt) - 1 + j)
            for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
            for j in range(len(answer))
        ]
        row, position = torch.tensor(where).T
        logits = self.base.get_output_embeddings()(hidden[row, position])
        return functional.cross_entropy(logits.float(), torch.tensor(list(itertools.chain(*answers))))

    @torch.no_grad()
    def scores(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """One pass over the prompts, then one on their KV cache over the likeliest choices' later tokens.

        A choice's first token bounds its score from above. With many choices only the `SCORED_IN_FULL` best
        by that bound are scored in full and the others keep the bound; a row in which such a bound would win
        is done again with every choice, so the best choice is always the true one.
        """
        scores, settled = self._scores(prompts, SCORED_IN_FULL)
        if not settled.all():
            open_rows = (~settled).nonzero()[:, 0]
            again, _ = self._scores([prompts[i] for i in open_rows.tolist()], len(self.choices))
            scores[open_rows] = again
        return scores

    def _scores(self, prompts: Sequence[list[int]], max_full: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [P, C], of which at most `max_full` a row are exact, and whether each row's best is [P]."""
        out = self.base(inputs_embeds=self._embedded(torch.tensor(prompts)), use_cache=True, logits_to_keep=1)
        first = out.logits.float().log_softmax(-1)
        targets = _padded(self.choices, IGNORED)
        bounds = first[:, 0, targets[:, 0]]
        if targets.shape[1] == 1:
            return bounds, torch.ones(len(prompts), dtype=torch.bool)
        picked = bounds.topk(min(max_full, len(self.choices)), dim=-1).indices
        wanted = targets[picked].flatten(0, 1)
        cache = out.past_key_values
        cache.batch_repeat_interleave(picked.shape[1])
        fed = wanted[:, :-1].clamp(min=0)
        later = self.base(input_ids=fed, past_key_values=cache, use_cache=True).logits.float().log_softmax(-1)
        steps = torch.cat([first.repeat_interleave(picked.shape[1], dim=0), later], dim=1)
        full = _summed(steps, wanted).view(len(prompts), -1)
        scores = bounds.scatter(1, picked, full)
        return scores, full.amax(-1) >= scores.amax(-1)


class _EncoderDecoder(AnswerModel):
    """An encoder-decoder: the prompt goes to the encoder, the answer is the decoder's."""

    def _starts(self, answers: torch.Tensor) -> torch.Tensor:
        start = torch.full((answers.shape[0], 1), self.base.config.decoder_start_token_id)
        return torch.cat([start, answers[:, :-1].clamp(min=0)], dim=1)

    def loss(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> torch.Tensor:
        pad = self.tokenizer.pad_token_id
        ids, labels = _padded(prompts, pad), _padded(answers, IGNORED)
        logits = self.model(
            input_ids=ids, attention_mask=(ids != pad).long(), decoder_input_ids=self._starts(labels)
        ).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    @torch.no_grad()
    def scores(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        encoded = self.base.get_encoder()(input_ids=torch.tensor(prompts)).last_hidden_state
        targets = _padded(self.choices, IGNORED)
        states = BaseModelOutput(last_hidden_state=encoded.repeat_interleave(len(self.choices), dim=0))
        fed = self._starts(targets).repeat(len(prompts), 1)
        steps = self.base(encoder_outputs=states, decoder_input_ids=fed).logits.float().log_softmax(-1)
        return _summed(steps, targets.repeat(len(prompts), 1)).view(len(prompts), -1)


def _padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([list(row) + [fill] * (longest - len(row)) for row in rows])


def _summed(steps: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Summed log-probabilities of the wanted tokens. steps [N, L, V], wanted [N, L] (IGNORED pads) -> [N]."""
    picked = steps.gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
    return picked.masked_fill(wanted == IGNORED, 0.0).sum(-1)


def equal_length_batches(prompts: Sequence[list[int]], max_rows: int) -> Iterator[list[int]]:
    """Indices of `prompts` in batches of equal token count, so that no row meets padding."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for _, group in itertools.groupby(order, key=lambda i: len(prompts[i])):
        members = list(group)
        for start in range(0, len(members), max_rows):
            yield members[start : start + max_rows]


def predict(asked: AnswerModel, rows: Iterable[Row], max_rows: int = 32) -> tuple[list[str], float]:
    """The best label of every row, in order, and the mean negative log-likelihood among the choices. fp32.

    With more than `SCORED_IN_FULL` choices the likelihood is a little too low (see `_Decoder.scores`).
    """
    rows = list(rows)
    prompts = [asked.prompt_ids(row.text) for row in rows]
    answers = [""] * len(rows)
    loss = 0.0
    asked.model.eval()
    for members in tqdm(list(equal_length_batches(prompts, max_rows)), desc="scoring", leave=False, delay=5):
        scores = asked.scores([prompts[i] for i in members])
        for i, row_scores in zip(members, scores, strict=True):
            answers[i] = asked.labels[int(row_scores.argmax())]
            loss -= float(row_scores.log_softmax(-1)[asked.labels.index(rows[i].label)])
    return answers, loss / len(rows)
