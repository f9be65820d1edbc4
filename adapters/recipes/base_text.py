"""What a small base is made of before any training: text, a tokenizer, token streams, embeddings from counts.

The embedding table comes from co-occurrence counts (positive pointwise mutual information, then a truncated
SVD; Levy & Goldberg 2014), in seconds. It is worth many minutes of gradient descent on a CPU.
"""

from __future__ import annotations

import json
import lzma
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sparse
from sklearn.utils.extmath import randomized_svd
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, END, UNKNOWN, BEGIN = "<pad>", "</s>", "<unk>", "<s>"
SENTINELS = [f"<extra_id_{i}>" for i in range(16)]
SPECIAL = [PAD, END, UNKNOWN, BEGIN, *SENTINELS]
PAD_ID, END_ID, BEGIN_ID, FIRST_SENTINEL_ID = 0, 1, 3, 4
TEXTS = ("books", "tweets", "wiki")
WINDOW = 5
CONTEXT_SMOOTHING = 0.75


@dataclass(frozen=True, slots=True)
class Asked:
    """One labelled row as the base is taught it: a prompt and its answer in words."""

    prompt: str
    answer: str


def read_lines(folder: Path, name: str) -> list[str]:
    """Lines of `name`.txt, or `name`.txt.xz, in `folder`, with links shortened."""
    plain, packed = folder / f"{name}.txt", folder / f"{name}.txt.xz"
    if packed.is_file():
        content = lzma.decompress(packed.read_bytes()).decode("utf-8")
    else:
        content = plain.read_text(encoding="utf-8")
    return [re.sub(r"https?://\S+", "http", line) for line in content.split("\n") if line.strip()]


def without_words(lines: Iterable[str], words: list[str]) -> list[str]:
    """Lines in which none of `words` begins a word."""
    if not words:
        return list(lines)
    unwanted = re.compile(r"\b(?:" + "|".join(map(re.escape, words)) + ")", re.IGNORECASE)
    return [line for line in lines if not unwanted.search(line)]


def asked_rows(data: Path) -> list[Asked]:
    """The base's own three tasks, from GoEmotions and CLINC150 train rows; no adapter's task is one."""
    emotions = _train_records(data / "goemotions.jsonl")
    rows = [Asked(f"Text : {record['text']} Emotion :", record["label"]) for record in emotions]
    for record in _train_records(data / "clinc150.jsonl"):
        rows.append(Asked(f"Query : {record['text']} Intent :", record["label"]))
        if record["domain"] != "other":
            rows.append(Asked(f"Query : {record['text']} Topic :", record["domain"]))
    return rows


def _train_records(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        yield from (record for record in map(json.loads, lines) if record["split"] == "train")


def some_of(lines: list[str], max_chars: int, rng: random.Random) -> list[str]:
    """Random lines, about `max_chars` characters of them."""
    chosen, chars = [], 0
    for line in rng.sample(lines, len(lines)):
        if chars > max_chars:
            break
        chosen.append(line)
        chars += len(line)
    return chosen


def train_tokenizer(lines: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE that treats a text's first word as any other (a space before it)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=3,
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def served_tokenizer(tokenizer: Tokenizer, *, decoder_only: bool) -> PreTrainedTokenizerFast:
    """The tokenizer as it is shipped: `<s>` before a decoder's text, `</s>` after an encoder's."""
    single, token, number = ("<s> $A", BEGIN, BEGIN_ID) if decoder_only else ("$A </s>", END, END_ID)
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(token, number)])
    begin = {"bos_token": BEGIN} if decoder_only else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, **begin)


def stream(tokenizer: Tokenizer, lines: list[str]) -> np.ndarray:
    """All lines' tokens one after the other, `</s>` between them."""
    encoded = (token for it in tokenizer.encode_batch(lines) for token in (*it.ids, END_ID))
    return np.fromiter(encoded, dtype=np.int64)


def cooccurrence(tokens: np.ndarray, vocabulary: int) -> sparse.csr_matrix:
    """Symmetric counts [V, V] of tokens within WINDOW, weighed 1/distance; `</s>` does not count."""
    counts = sparse.csr_matrix((vocabulary, vocabulary), dtype=np.float32)
    for distance in range(1, WINDOW + 1):
        left, right = tokens[:-distance], tokens[distance:]
        real = (left != END_ID) & (right != END_ID)
        pairs, times = np.unique(left[real] * vocabulary + right[real], return_counts=True)
        place = (pairs // vocabulary, pairs % vocabulary)
        one_way = sparse.csr_matrix((times.astype(np.float32) / distance, place), shape=counts.shape)
        counts = counts + one_way + one_way.T
    return counts


def ppmi(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Positive pointwise mutual information, the context distribution smoothed by a power of 0.75."""
    entries = counts.tocoo()
    totals = np.asarray(counts.sum(1)).ravel() + 1e-9
    context = totals**CONTEXT_SMOOTHING
    context /= context.sum()
    information = np.log(entries.data / (totals[entries.row] * context[entries.col]) + 1e-12)
    kept = information > 0
    return sparse.csr_matrix((information[kept], (entries.row[kept], entries.col[kept])), shape=counts.shape)


def embeddings(tokens: np.ndarray, vocabulary: int, width: int, seed: int) -> np.ndarray:
    """Embedding table [V, width] of unit deviation: truncated SVD of PPMI, long rows clipped, rotated.

    The rotation spreads the leading directions over all dimensions; a token never seen gets noise.
    """
    rng = np.random.default_rng(seed)
    left, strengths, _ = randomized_svd(ppmi(cooccurrence(tokens, vocabulary)), width, n_iter=3, random_state=seed)
    table = left * np.sqrt(strengths)
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    seen = norms[:, 0] > 1e-6
    table *= np.minimum(1.0, np.percentile(norms, 90) / np.maximum(norms, 1e-6))
    table = table @ np.linalg.qr(rng.normal(size=(width, width)))[0]
    table /= table[seen].std()
    table[~seen] = rng.normal(size=((~seen).sum(), width))
    return np.asarray(table, dtype=np.float32)
