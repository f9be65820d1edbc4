"""Raw files become rows. All rows here are invented."""

from __future__ import annotations

from pathlib import Path

import pytest
import sources
from sources import SOURCES, Source, convert, hundredth, identity, without_repeats
from tasks import TASKS, Row, rows_by_split

RAW = {
    "twitter-complaints": {
        "complaints-data.csv": (
            '11,"@acme my parcel is late, again &amp; again",1,other\n'
            "12,@acme when do you open?,0,other\n"
            '13,"he said ""hi"" to @acme",0,food\n'
        )
    },
    "sms-spam": {"SMSSpamCollection": 'Label\tSMS\nham\tsee you  at six\nspam\tWIN a "boat" now\n\n'},
    "trec": {
        "data/TREC.train.all": "3 Who baked the bread ?\n0 What is a kite ?\n2 What does ABC stand for ?\n",
        "data/TREC.test.all": "5 How many eggs are there ?\n4 Where is the well ?\n1 What bird sings ?\n",
    },
    "subj": {"data/subj.all": "0 a lovely mess . \n1 a cook moves to a small town . \n"},
    "sst2": {
        "data/stsa.binary.train": "1 quite a joy .\n",
        "data/stsa.binary.dev": "0 a dull hour .\n",
        "data/stsa.binary.test": "0 no fun at all .\n",
    },
    "banking77": {
        "banking_data/train.csv": "text,category\nMy refund is not there,Refund_not_showing_up\n",
        "banking_data/test.csv": 'text,category\n"Hello, may I pay by card?",topping_up_by_card\n',
    },
}


def test_every_source_has_a_fixture_and_the_other_way_round() -> None:
    assert set(RAW) == set(SOURCES) <= set(TASKS)
    for name, files in RAW.items():
        assert set(files) == set(SOURCES[name].files)


@pytest.mark.parametrize("name", sorted(RAW))
def test_labels_are_the_tasks_own(name: str) -> None:
    rows = convert(SOURCES[name], RAW[name])
    assert rows
    assert {row.label for row in rows} <= set(TASKS[name].labels)
    assert all(row.text == " ".join(row.text.split()) for row in rows)


def test_complaints_are_cleaned() -> None:
    rows = {row.text: row.label for row in convert(SOURCES["twitter-complaints"], RAW["twitter-complaints"])}
    assert rows == {
        "@acme my parcel is late, again & again": "complaint",
        "@acme when do you open?": "no complaint",
        'he said "hi" to @acme': "no complaint",
    }


def test_published_splits_are_kept() -> None:
    rows = convert(SOURCES["sst2"], RAW["sst2"])
    assert {row.split: row.label for row in rows} == {
        "train": "positive",
        "validation": "negative",
        "test": "negative",
    }
    trec = {row.text: (row.split, row.label) for row in convert(SOURCES["trec"], RAW["trec"])}
    assert trec["How many eggs are there ?"] == ("test", "number")
    assert trec["Who baked the bread ?"][1] == "person"


def test_the_hash_split_is_about_70_10_20_and_blind_to_case() -> None:
    raw = "".join(f"ham\tmessage number {i}\n" for i in range(2000))
    rows = convert(SOURCES["sms-spam"], {"SMSSpamCollection": raw})
    shares = {split: sum(row.split == split for row in rows) / len(rows) for split in ("train", "validation", "test")}
    assert shares["train"] == pytest.approx(0.7, abs=0.05)
    assert shares["test"] == pytest.approx(0.2, abs=0.05)
    assert hundredth("Hello, you!") == hundredth("hello you")
    assert identity("?!") == "?!"


def test_a_repeat_across_splits_stays_held_out() -> None:
    rows = [
        Row(split="train", text="Same text.", label="a"),
        Row(split="test", text="same TEXT", label="a"),
        Row(split="train", text="other", label="b"),
    ]
    assert [(row.split, row.text) for row in without_repeats(rows)] == [("train", "other"), ("test", "same TEXT")]


def test_validation_is_taken_out_of_train_only_where_asked() -> None:
    raw = {"t": "".join(f"0 question {i} ?\n" for i in range(500))}
    taken = convert(Source(files={"t": "train"}, parse=sources.parse_trec, validation_from_train=True), raw)
    kept = convert(Source(files={"t": "train"}, parse=sources.parse_trec), raw)
    assert {row.split for row in taken} == {"train", "validation"}
    assert {row.split for row in kept} == {"train"}


def test_the_whole_way_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(task: object, path: str) -> str:
        asked.append(path)
        return RAW["trec"][path]

    monkeypatch.setattr(sources, "fetch", fetch)
    monkeypatch.setattr("sys.argv", ["sources.py", "--out", str(tmp_path), "--task", "trec"])
    sources.main()
    assert asked == list(SOURCES["trec"].files)
    assert len(rows_by_split(TASKS["trec"], tmp_path)["test"]) == 3
