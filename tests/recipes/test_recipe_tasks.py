"""The tables of tasks and recipes hold together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sources import SOURCES
from tasks import BANKING77_LABELS, RECIPES, TASKS, Wording, read_rows, rows_by_split, serve_file


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_task_is_complete(name: str) -> None:
    task = TASKS[name]
    assert task.name == name
    assert name in SOURCES
    assert len(task.commit) == 40
    assert task.repository.count("/") == 1
    for wording in task.wordings.values():
        assert tuple(wording.choices) == task.labels, "every wording answers with the same labels"
        assert wording.template.endswith(" :")


def test_a_recipe_names_a_task_a_wording_and_a_method() -> None:
    for (base, name), recipe in RECIPES.items():
        assert base == recipe.base
        assert name == recipe.adapter
        assert recipe.wording in TASKS[recipe.task].wordings
        assert recipe.method in ("lora", "ia3", "prompt")


def test_banking_has_77_labels_of_which_none_begins_another() -> None:
    assert len(set(BANKING77_LABELS)) == 77
    for label in BANKING77_LABELS:
        assert label == label.strip()
        assert "_" not in label
        assert "|" not in label
        assert not any(other != label and other.startswith(label + " ") for other in BANKING77_LABELS)


@pytest.mark.parametrize("template", ["no place for it", "{text} twice {text}"])
def test_a_template_holds_the_text_exactly_once(template: str) -> None:
    with pytest.raises(ValueError, match="exactly once"):
        Wording(template=template, choices={"a": "a", "b": "b"})


def test_two_labels_cannot_share_their_words() -> None:
    with pytest.raises(ValueError, match="share"):
        Wording(template="{text}", choices={"a": "same", "b": "same"})


def test_braces_in_a_text_stay() -> None:
    wording = Wording(template="Text : {text} Label :", choices={"a": "a", "b": "b"})
    assert wording.prompt("{0} {text} {x!r}") == "Text : {0} {text} {x!r} Label :"


def test_rows_with_a_foreign_label_are_skipped(tmp_path: Path) -> None:
    records = [
        {"split": "train", "text": "hello you", "label": "ham"},
        {"split": "test", "text": "SMS", "label": "Label"},
        {"split": "test", "text": "win now", "label": "spam"},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "sms_spam.jsonl").write_text(lines, encoding="utf-8")
    splits = rows_by_split(TASKS["sms-spam"], tmp_path)
    assert {split: [row.label for row in rows] for split, rows in splits.items()} == {
        "train": ["ham"],
        "validation": [],
        "test": ["spam"],
    }


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"trec\.jsonl"):
        list(read_rows(TASKS["trec"], tmp_path))


def test_the_serve_file_maps_labels_to_words() -> None:
    assert serve_file(TASKS["twitter-complaints"].wordings["emotion"], 4) == {
        "template": "Text : {text} Emotion :",
        "choices": {"complaint": "annoyance", "no complaint": "neutral"},
        "parameters": {"max_new_tokens": 4},
        "labels": ["complaint", "no complaint"],
    }
