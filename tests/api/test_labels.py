"""Logits become what transformers' pipelines say, on tiny random models."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, pipeline

from peft_serve.api.labels import answers_of, checked_rows, entities_of, ranked, scores_of
from peft_serve.errors import Internal
from peft_serve.text import TextCodec

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # the pipelines' own
SENTENCES = (
    "Anna lives in New York.",
    "my orders came on Monday and xyz",
    "who ?",
    "Anna and Anna , where is my parcel ?",
)


@pytest.fixture(scope="module")
def codec(pair_tokenizer: Any) -> TextCodec:
    return TextCodec(pair_tokenizer, is_encoder_decoder=False)


def config_of(tokenizer: Any, labels: list[str]) -> BertConfig:
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        initializer_range=1.0,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )


def logits_of(model: Any, codec: TextCodec, text: str, pair: str | None = None) -> tuple[Any, Any]:
    encoded = codec.encode_fully(text, pair)
    with torch.no_grad():
        out = model(input_ids=torch.tensor([encoded.ids]), token_type_ids=torch.tensor([encoded.segments]))
    return encoded, out.logits[0].tolist()


@pytest.mark.parametrize("labels", [["one"], ["a", "b"], ["a", "b", "c", "d"]])
def test_scores_are_the_pipelines(pair_tokenizer: Any, codec: TextCodec, labels: list[str]) -> None:
    torch.manual_seed(len(labels))
    model = BertForSequenceClassification(config_of(pair_tokenizer, labels)).eval()
    pipe = pipeline("text-classification", model=model, tokenizer=pair_tokenizer, device=-1)
    for text, pair in ((SENTENCES[0], None), (SENTENCES[1], SENTENCES[0])):
        given = text if pair is None else {"text": text, "text_pair": pair}
        _, logits = logits_of(model, codec, text, pair)
        for function in (None, "softmax", "sigmoid", "none"):
            for top_k in (None, 1, 2):
                expected = pipe([given], top_k=top_k, function_to_apply=function)[0]
                got = ranked(zip(labels, scores_of(logits, function), strict=True), top_k)
                assert [each["label"] for each in got] == [each["label"] for each in expected]
                assert [each["score"] for each in got] == pytest.approx([e["score"] for e in expected], rel=1e-5)


def test_entities_are_the_pipelines(pair_tokenizer: Any, codec: TextCodec) -> None:
    labels = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC"]
    torch.manual_seed(1)
    model = BertForTokenClassification(config_of(pair_tokenizer, labels)).eval()
    pipe = pipeline("token-classification", model=model, tokenizer=pair_tokenizer, device=-1)
    num_seen = 0
    for text in SENTENCES:
        encoded, logits = logits_of(model, codec, text)
        for ignored in (["O"], [], ["O", "MISC", "PER"]):
            for strategy in ("none", "simple"):
                expected = pipe(text, aggregation_strategy=strategy, ignore_labels=ignored)
                got = entities_of(
                    logits, labels, encoded, text, codec, ignored=ignored, is_grouped=strategy == "simple"
                )
                assert [set(each) for each in got] == [set(each) for each in expected]
                for mine, other in zip(got, expected, strict=True):
                    assert mine.pop("score") == pytest.approx(float(other.pop("score")), rel=1e-5)
                    assert mine == other
                num_seen += len(got)
    assert num_seen > 50


def best_spans(rows: list[list[float]], encoded: Any, cls_id: int, most: int) -> list[tuple[float, int, int]]:
    """Every span of the context with its share, the way the question answering pipeline of transformers 4 had it."""
    allowed = np.array([of == 1 or id_ == cls_id for of, id_ in zip(encoded.texts, encoded.ids, strict=True)])
    shares = []
    for column in np.array(rows).T:
        masked = np.where(allowed, column, -10000.0)
        weights = np.exp(masked - masked.max())
        shares.append(weights / weights.sum())
    starts, ends = shares
    none = starts[0] * ends[0]
    starts[0] = ends[0] = 0.0
    table = np.tril(np.triu(np.outer(starts, ends)), most - 1)
    spans = [(table[i, j], i, j) for i, j in np.argwhere(table > 0) if allowed[i] and allowed[j]]
    return [(none, 0, 0), *sorted(spans, key=lambda span: -span[0])]


def test_answers_are_the_likeliest_spans(codec: TextCodec) -> None:
    generator = np.random.default_rng(7)
    context = "The parcel came on Monday , and Anna lives in New York . My orders came ?"
    encoded = codec.encode_fully("where is my parcel", context)
    assert codec.cls_id is not None
    for most in (1, 3, 15):
        rows = generator.normal(size=(len(encoded.ids), 2)).tolist()
        (none, _, _), *spans = best_spans(rows, encoded, codec.cls_id, most)
        for align in (False, True):
            got = answers_of(
                rows, encoded, context, codec, top_k=4, max_answer_len=most, with_none=True, align_to_words=align
            )
            expected: dict[str, float] = {}
            for score, first, last in spans[:4]:
                words = context[encoded.offsets[first][0] : encoded.offsets[last][1]]
                expected[words.lower()] = expected.get(words.lower(), 0.0) + score
            if not align:
                expected[""] = none
                ordered = sorted(expected.items(), key=lambda item: -item[1])[:4]
                assert [each["answer"].lower() for each in got] == [words for words, _ in ordered]
                assert [each["score"] for each in got] == pytest.approx([score for _, score in ordered])
            for each in got:
                assert context[each["start"] : each["end"]] == each["answer"]


def test_answers_begin_and_end_with_words(codec: TextCodec) -> None:
    context = "my orders came"
    encoded = codec.encode_fully("what", context)
    assert codec.pieces(encoded.ids)[4:6] == ["order", "##s"]
    rows = [[9.0 * (i == 5), 9.0 * (i == 5)] for i in range(len(encoded.ids))]
    (aligned,) = answers_of(rows, encoded, context, codec)
    (bare,) = answers_of(rows, encoded, context, codec, align_to_words=False)
    assert (aligned["answer"], bare["answer"]) == ("orders", "s")
    spread = [[9.0 * (i == 4), 9.0 * (i in (4, 5))] for i in range(len(encoded.ids))]
    (merged,) = answers_of(spread, encoded, context, codec, top_k=2)[:1]
    assert merged["answer"] == "orders"
    assert merged["score"] > 0.9, "two spans of the same words are one answer"


def test_extreme_logits_stay_finite() -> None:
    assert scores_of([1000.0, -1000.0], None) == [1.0, 0.0]
    assert scores_of([-1000.0], None) == [0.0]
    assert scores_of([1000.0], None) == [1.0]
    for rows in ([], [[math.inf, 0.0]], [[0.0, math.nan]]):
        with pytest.raises(Internal):
            checked_rows(rows)
    with pytest.raises(Internal):
        checked_rows([[0.0]], 2)


@pytest.mark.parametrize("first", [0, 1, 4, 9])
@pytest.mark.parametrize("second", [None, 1, 4, 9])
def test_long_texts_are_cut_as_the_tokenizer_cuts_them(
    pair_tokenizer: Any, codec: TextCodec, first: int, second: int | None
) -> None:
    own = copy.deepcopy(pair_tokenizer)  # a tokenizer remembers how it cut last
    text, pair = "new york " * first, None if second is None else "my order " * second
    for length in range(5, 20):
        expected = own(text, pair, truncation="longest_first", max_length=length)
        got = codec.encode_fully(text, pair).shortened(length)
        assert list(got.ids) == expected["input_ids"]
        assert list(got.segments) == expected["token_type_ids"]
        assert len(got.offsets) == len(got.words) == len(got.ids)
