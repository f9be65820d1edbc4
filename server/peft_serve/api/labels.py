"""From a task head's logits to labels, entities and answers, as transformers' pipelines give them.

Pure functions over rows of logits and what is known of their tokens.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from peft_serve.errors import Internal
from peft_serve.text import Encoded, TextCodec

Row = Sequence[float]

IGNORED: Final = ("O",)
"""Labels of tokens that are no entity."""

MAX_ANSWER_LEN: Final = 15
_NEVER: Final = -10000.0  # the logit of a token that cannot be part of an answer


def checked_rows(rows: Sequence[Row], num_rows: int | None = None) -> Sequence[Row]:
    """What a request read, when it can be told; raises Internal."""
    if not rows or (num_rows is not None and len(rows) != num_rows):
        raise Internal("the request ended without what was to be read")
    if not all(math.isfinite(value) for row in rows for value in row):
        raise Internal("the model gave values that are not finite; another dtype (--dtype float32) may hold them")
    return rows


def scores_of(logits: Row, function: str | None) -> list[float]:
    """Scores of a sequence's labels: softmax of several, sigmoid of one, unless `function` says otherwise."""
    function = function or ("sigmoid" if len(logits) == 1 else "softmax")
    if function == "sigmoid":
        return [_sigmoid(logit) for logit in logits]
    return _softmax(logits) if function == "softmax" else list(logits)


def ranked(scores: Iterable[tuple[str, float]], top_k: int | None) -> list[dict[str, Any]]:
    """Labels with their scores, best first."""
    order = sorted(scores, key=lambda item: -item[1])
    return [{"label": label, "score": score} for label, score in order[:top_k]]


def _sigmoid(logit: float) -> float:
    # Each form is exact where the other overflows.
    return 1.0 / (1.0 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1.0 + math.exp(logit))


def _softmax(logits: Row) -> list[float]:
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    whole = sum(weights)
    return [weight / whole for weight in weights]


# ---- tokens


def entities_of(
    rows: Sequence[Row],
    labels: Sequence[str],
    encoded: Encoded,
    text: str,
    codec: TextCodec,
    *,
    ignored: Collection[str] = IGNORED,
    is_grouped: bool = False,
) -> list[dict[str, Any]]:
    """The labelled tokens of a text, special tokens left out; neighbours of one entity as one if `is_grouped`."""
    pieces = codec.pieces(encoded.ids)
    entities: list[dict[str, Any]] = []
    for i in encoded.places(0):
        scores = _softmax(rows[i])
        best = max(range(len(scores)), key=scores.__getitem__)
        start, end = encoded.offsets[i] if encoded.offsets else (None, None)
        is_unknown = encoded.ids[i] == codec.unknown_id and start is not None
        entities.append(
            {
                "entity": labels[best],
                "score": scores[best],
                "index": i,
                "word": text[start:end] if is_unknown else pieces[i],
                "start": start,
                "end": end,
            }
        )
    if not is_grouped:
        return [entity for entity in entities if entity["entity"] not in ignored]
    return [group for group in _grouped(entities, codec) if group["entity_group"] not in ignored]


def _grouped(entities: Sequence[Mapping[str, Any]], codec: TextCodec) -> list[dict[str, Any]]:
    """Runs of one tag; a `B-` begins a new one."""
    groups: list[list[Mapping[str, Any]]] = []
    for entity in entities:
        begins, tag = _tag(entity["entity"])
        if groups and not begins and _tag(groups[-1][-1]["entity"])[1] == tag:
            groups[-1].append(entity)
        else:
            groups.append([entity])
    return [
        {
            "entity_group": group[0]["entity"].split("-", 1)[-1],
            "score": sum(entity["score"] for entity in group) / len(group),
            "word": codec.joined([entity["word"] for entity in group]),
            "start": group[0]["start"],
            "end": group[-1]["end"],
        }
        for group in groups
    ]


def _tag(label: str) -> tuple[bool, str]:
    """Whether a label begins an entity, and of which kind."""
    return label.startswith("B-"), label[2:] if label[:2] in ("B-", "I-") else label


# ---- spans


def answers_of(
    rows: Sequence[Row],
    encoded: Encoded,
    context: str,
    codec: TextCodec,
    *,
    top_k: int = 1,
    max_answer_len: int = MAX_ANSWER_LEN,
    with_none: bool = False,
    align_to_words: bool = True,
) -> list[dict[str, Any]]:
    """The best spans of the context as answers, best first; those of the same words as one.

    A span's score is the product of its ends' shares among the context's tokens and the first token of the
    sequence, which stands for no answer where the tokenizer has such a token.
    """
    places = encoded.places(1)
    nowhere = [i for i, id_ in enumerate(encoded.ids) if codec.cls_id is not None and id_ == codec.cls_id]
    starts = _shares([row[0] for row in rows], places + nowhere)
    ends = _shares([row[1] for row in rows], places + nowhere)
    none_score = starts[0] * ends[0] if nowhere else 0.0
    answers: list[dict[str, Any]] = []
    for score, first, last in _best_spans(places, starts, ends, max_answer_len, top_k):
        start, end = _characters(encoded, first, last, align_to_words=align_to_words)
        words = context[start:end]
        same = next((answer for answer in answers if answer["answer"].lower() == words.lower()), None)
        if same is not None:
            same["score"] += score
        else:
            answers.append({"score": score, "start": start, "end": end, "answer": words})
    if with_none:
        answers.append({"score": none_score, "start": 0, "end": 0, "answer": ""})
    return sorted(answers, key=lambda answer: -answer["score"])[:top_k]


def _shares(logits: Sequence[float], places: Collection[int]) -> list[float]:
    allowed = set(places)
    return _softmax([logit if i in allowed else _NEVER for i, logit in enumerate(logits)])


def _best_spans(
    places: Sequence[int], starts: Sequence[float], ends: Sequence[float], max_answer_len: int, top_k: int
) -> list[tuple[float, int, int]]:
    """(score, first token, last token), best first; of equals the earlier."""
    spans = (
        (starts[first] * ends[last], first, last)
        for i, first in enumerate(places)
        for last in places[i : i + max_answer_len]
    )
    return heapq.nlargest(top_k, spans, key=lambda span: span[0])


def _characters(encoded: Encoded, first: int, last: int, *, align_to_words: bool) -> tuple[int, int]:
    """The characters of a span of tokens, out to the ends of the words that they are parts of."""
    start, end = encoded.offsets[first][0], encoded.offsets[last][1]
    if align_to_words and encoded.words[first] is not None and encoded.words[last] is not None:
        of_text = encoded.places(1)
        start = min(encoded.offsets[i][0] for i in of_text if encoded.words[i] == encoded.words[first])
        end = max(encoded.offsets[i][1] for i in of_text if encoded.words[i] == encoded.words[last])
    return start, end
