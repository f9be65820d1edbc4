"""Make a small base from open text: tokenizer, embeddings from counts, then multi-task pre-training.

    python adapters/recipes/pretrain_base.py --kind llama --text TEXT --data DATA --out OUT --steps 3400

TEXT is a folder with books.txt, tweets.txt and wiki.txt (or .txt.xz), one text a line. DATA holds
goemotions.jsonl and clinc150.jsonl. README.md names where all of them are published. Half of the work is
language modelling (span corruption for `--kind t5`), half is answering the base's own three labelling tasks
in words, after T0.
`--steps 5 --vocabulary 600` is a rehearsal of seconds.
"""

from __future__ import annotations

import argparse
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import base_text as text
import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

IGNORED = -100
BATCH_TOKENS = 2048
TEXT_SHARES = {"books": 0.45, "tweets": 0.47, "wiki": 0.08}
WARMUP_STEPS = 40
PROMPT_WEIGHT, ANSWER_WEIGHT = 0.3, 4.0


@dataclass(frozen=True, slots=True)
class Encoded:
    """An `Asked` row in tokens."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """All that is learned from: a token stream for each kind of text, and the labelled rows."""

    streams: dict[str, np.ndarray]
    asked: list[Encoded]
    held_out: list[Encoded]


def load_corpus(options: argparse.Namespace, rng: random.Random) -> tuple[Tokenizer, Corpus]:
    """Read, clean, fit the tokenizer, tokenise."""
    unwanted = options.drop_words.read_text(encoding="utf-8").split() if options.drop_words else []
    lines = {name: text.without_words(text.read_lines(options.text, name), unwanted) for name in text.TEXTS}
    asked = text.asked_rows(options.data)
    sample = [line for name in text.TEXTS for line in text.some_of(lines[name], options.tokenizer_chars, rng)]
    sample += [row.prompt for row in asked] + [row.answer for row in asked]
    tokenizer = text.train_tokenizer(sample, options.vocabulary)
    used = {name: text.some_of(lines[name], options.max_chars, rng) for name in text.TEXTS}
    streams = {name: text.stream(tokenizer, it) for name, it in used.items()}
    prompts = tokenizer.encode_batch([row.prompt for row in asked])
    answers = tokenizer.encode_batch([row.answer for row in asked])
    rows = [Encoded(p.ids, a.ids) for p, a in zip(prompts, answers, strict=True) if len(p.ids) < 90]
    rng.shuffle(rows)
    cut = min(600, len(rows) // 10)
    return tokenizer, Corpus(streams=streams, asked=rows[cut:], held_out=rows[:cut])


class Learner(ABC):
    """One architecture: its model, its two kinds of batches, its loss."""

    model: Any
    lengths: tuple[int, ...]

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self.corpus = corpus
        self.rng = np.random.default_rng(seed)

    def text_rows(self) -> np.ndarray:
        """Random pieces [N, L] of one random stream, BATCH_TOKENS in all."""
        name = self.rng.choice(list(TEXT_SHARES), p=list(TEXT_SHARES.values()))
        stream = self.corpus.streams[str(name)]
        length = min(int(self.rng.choice(self.lengths, p=(0.6, 0.3, 0.1))), len(stream) // 2)
        starts = self.rng.integers(0, len(stream) - length, max(1, BATCH_TOKENS // length))
        return np.stack([stream[start : start + length] for start in starts])

    @abstractmethod
    def text_loss(self) -> torch.Tensor:
        """Loss of one batch of plain text."""

    @abstractmethod
    def asked_loss(self, rows: list[Encoded]) -> torch.Tensor:
        """Loss of one batch of labelled rows."""

    @abstractmethod
    def is_right(self, row: Encoded) -> bool:
        """Does the model, taking its likeliest token each time, give exactly the answer?"""


class Decoder(Learner):
    """A Llama of 6 million parameters."""

    lengths = (64, 128, 256)

    def __init__(self, corpus: Corpus, table: np.ndarray, seed: int) -> None:
        super().__init__(corpus, seed)
        config = LlamaConfig(
            vocab_size=table.shape[0],
            hidden_size=table.shape[1],
            intermediate_size=704,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=text.BEGIN_ID,
            eos_token_id=text.END_ID,
            pad_token_id=text.PAD_ID,
        )
        self.model = LlamaForCausalLM(config)
        with torch.no_grad():
            self.model.model.embed_tokens.weight.copy_(torch.tensor(table) * 0.03)

    def text_loss(self) -> torch.Tensor:
        """Next-token loss on half of the positions, which saves half of the output layer's work."""
        rows = torch.tensor(self.text_rows())
        begin = torch.full((rows.shape[0], 1), text.BEGIN_ID)
        weights = (torch.rand(rows.shape) < 0.5).float()
        return self._weighted(torch.cat([begin, rows[:, :-1]], dim=1), rows, weights)

    def asked_loss(self, rows: list[Encoded]) -> torch.Tensor:
        whole = [[text.BEGIN_ID, *row.prompt, *row.answer, text.END_ID] for row in rows]
        ids = _padded(whole, text.PAD_ID)
        weights = torch.zeros(ids.shape)
        for i, row in enumerate(rows):
            weights[i, : len(row.prompt)] = PROMPT_WEIGHT
            weights[i, len(row.prompt) : len(whole[i]) - 1] = ANSWER_WEIGHT
        return self._weighted(ids[:, :-1], ids[:, 1:], weights[:, :-1])

    def _weighted(self, ids: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        counted = weights > 0
        losses = functional.cross_entropy(
            self.model.lm_head(hidden[counted]).float(), targets[counted], reduction="none"
        )
        return (losses * weights[counted]).sum() / weights[counted].sum()

    def is_right(self, row: Encoded) -> bool:
        ids = torch.tensor([[text.BEGIN_ID, *row.prompt, *row.answer]])
        best = self.model(input_ids=ids).logits[0].argmax(-1)[len(row.prompt) :]
        return list(best.tolist()) == [*row.answer, text.END_ID]


class EncoderDecoder(Learner):
    """A T5 of 6.5 million parameters, 4 + 2 layers."""

    lengths = (48, 96, 192)

    def __init__(self, corpus: Corpus, table: np.ndarray, seed: int) -> None:
        super().__init__(corpus, seed)
        config = T5Config(
            vocab_size=table.shape[0],
            d_model=table.shape[1],
            d_kv=64,
            d_ff=512,
            num_layers=4,
            num_decoder_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=True,
            pad_token_id=text.PAD_ID,
            eos_token_id=text.END_ID,
            decoder_start_token_id=text.PAD_ID,
        )
        self.model = T5ForConditionalGeneration(config)
        with torch.no_grad():
            self.model.shared.weight.copy_(torch.tensor(table))

    def text_loss(self) -> torch.Tensor:
        pairs = [corrupted(row.tolist(), self.rng) for row in self.text_rows()]
        return self._loss([source for source, _ in pairs], [target for _, target in pairs])

    def asked_loss(self, rows: list[Encoded]) -> torch.Tensor:
        return self._loss([[*r.prompt, text.END_ID] for r in rows], [[*r.answer, text.END_ID] for r in rows])

    def _loss(self, sources: list[list[int]], targets: list[list[int]]) -> torch.Tensor:
        ids = _padded(sources, text.PAD_ID)
        mask = (ids != text.PAD_ID).long()
        loss: torch.Tensor = self.model(input_ids=ids, attention_mask=mask, labels=_padded(targets, IGNORED)).loss
        return loss

    def is_right(self, row: Encoded) -> bool:
        answer = [*row.answer, text.END_ID]
        out = self.model(input_ids=torch.tensor([[*row.prompt, text.END_ID]]), labels=torch.tensor([answer]))
        return list(out.logits[0].argmax(-1).tolist()) == answer


def corrupted(tokens: list[int], rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Span corruption (Raffel et al. 2020): spans of 1 to 5 tokens become sentinels, spelt out after."""
    num_spans = max(1, min(len(text.SENTINELS) - 1, len(tokens) // 16))
    starts = sorted(rng.choice(len(tokens) - 5, size=num_spans, replace=False).tolist())
    source: list[int] = []
    target: list[int] = []
    sentinel, read = text.FIRST_SENTINEL_ID, 0
    for start in starts:
        if start < read:
            continue
        end = start + int(rng.integers(1, 6))
        source += [*tokens[read:start], sentinel]
        target += [sentinel, *tokens[start:end]]
        sentinel, read = sentinel + 1, end
    return [*source, *tokens[read:], text.END_ID], [*target, text.END_ID]


def _padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def asked_batches(rows: list[Encoded], rng: random.Random) -> Iterator[list[Encoded]]:
    """Endless batches of rows of similar length, about BATCH_TOKENS tokens each."""
    while True:
        order = sorted(rng.sample(rows, min(len(rows), 4096)), key=lambda row: len(row.prompt))
        batches, start = [], 0
        while start < len(order):
            longest = len(order[min(start + 40, len(order) - 1)].prompt) + 6
            batches.append(order[start : start + max(8, BATCH_TOKENS // longest)])
            start += len(batches[-1])
        rng.shuffle(batches)
        yield from batches


def optimizers(model: Any, kind: str) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, norms and biases."""
    matrices: list[torch.nn.Parameter] = []
    tables: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_table = "embed_tokens" in name or "shared" in name or "relative_attention_bias" in name
        (tables if is_table else matrices if parameter.ndim == 2 else others).append(parameter)
    rates = (4e-3, 1.5e-3, 3e-3) if kind == "llama" else (3e-3, 6e-3, 5e-3)
    groups = [{"params": tables, "lr": rates[1]}, {"params": others, "lr": rates[2]}]
    return [
        torch.optim.Muon(matrices, lr=rates[0], weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, flat until 30 % of the steps, then a cosine down to 5 %."""
    done = step / steps
    decay = 1.0 if done < 0.3 else 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (done - 0.3) / 0.7))
    return min(1.0, (step + 1) / WARMUP_STEPS) * decay


def pretrain(learner: Learner, options: argparse.Namespace, rng: random.Random) -> None:
    """The training loop: 30 % labelled batches in the first half of the steps, 50 % in the second."""
    learner.model.train()
    every = optimizers(learner.model, options.kind)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in every]
    asked = asked_batches(learner.corpus.asked, rng)
    bar = tqdm(range(options.steps), unit="step", mininterval=2.0)
    for step in bar:
        for optimizer, rates in zip(every, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step, options.steps)
        is_asked = rng.random() < (0.3 if step < options.steps / 2 else 0.5)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            loss = learner.asked_loss(next(asked)) if is_asked else learner.text_loss()
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
        torch.nn.utils.clip_grad_norm_(learner.model.parameters(), 1.0)
        for optimizer in every:
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix({"asked" if is_asked else "text": f"{float(loss.detach()):.3f}"}, refresh=False)


@torch.no_grad()
def exact_share(learner: Learner) -> float:
    """Share of held-out labelled rows answered exactly. The number to watch: stop when it is flat."""
    learner.model.eval()
    rows = learner.corpus.held_out
    return sum(map(learner.is_right, rows)) / max(1, len(rows))


def parser() -> argparse.ArgumentParser:
    it = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    it.add_argument("--kind", choices=("llama", "t5"), default="llama")
    it.add_argument("--text", type=Path, required=True, help="folder with books, tweets and wiki")
    it.add_argument("--data", type=Path, required=True, help="folder with goemotions.jsonl and clinc150.jsonl")
    it.add_argument("--out", type=Path, required=True, help="folder for the base, as `from_pretrained` reads it")
    it.add_argument("--steps", type=int, default=3400, help="batches of 2,048 tokens")
    it.add_argument("--vocabulary", type=int, default=8192)
    it.add_argument("--width", type=int, default=256)
    it.add_argument("--max-chars", type=int, default=24_000_000, help="of each kind of text")
    it.add_argument("--tokenizer-chars", type=int, default=4_000_000, help="of each kind, for the tokenizer")
    it.add_argument("--drop-words", type=Path, help="file of word beginnings; lines that hold one are left out")
    it.add_argument(
        "--precision", choices=("bf16", "fp32"), default="fp32", help="bf16 is fast only where the CPU has it"
    )
    it.add_argument("--seed", type=int, default=0)
    it.add_argument("--threads", type=int, default=1)
    return it


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    tokenizer, corpus = load_corpus(options, rng)
    tokens = np.concatenate([corpus.streams[name] for name in ("tweets", "wiki", "books")])
    table = text.embeddings(tokens, tokenizer.get_vocab_size(), options.width, options.seed)
    learner = (Decoder if options.kind == "llama" else EncoderDecoder)(corpus, table, options.seed)
    pretrain(learner, options, rng)
    print(f"held-out labelled rows answered exactly: {100 * exact_share(learner):.1f} %")
    learner.model.to(torch.bfloat16).save_pretrained(str(options.out))
    text.served_tokenizer(tokenizer, decoder_only=options.kind == "llama").save_pretrained(str(options.out))


if __name__ == "__main__":
    main()
