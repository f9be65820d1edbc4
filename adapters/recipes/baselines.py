"""What an adapter must be compared with: always the commonest label, and TF-IDF with logistic regression.

    python adapters/recipes/baselines.py --data DATA [--result adapters/recipes/results/baselines.json]

Both are fitted on the train split and scored on the same test rows as the adapters. Seconds on one core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from tasks import TASKS, Row, Task, rows_by_split
from tqdm import tqdm


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Accuracy and macro-F1 over some held-out rows."""

    accuracy: float
    macro_f1: float
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Baselines:
    """The two yardsticks of one task."""

    majority: Figures
    tfidf: Figures
    tfidf_cpu_s: float


def figures(truth: list[str], answers: list[str]) -> Figures:
    """Both measures, rounded to four digits."""
    return Figures(
        accuracy=round(float(accuracy_score(truth, answers)), 4),
        macro_f1=round(float(f1_score(truth, answers, average="macro", zero_division=0)), 4),
        rows=len(truth),
    )


def majority(train: list[Row], test: list[Row]) -> Figures:
    """The commonest label of the train split, whatever the text says."""
    commonest = Counter(row.label for row in train).most_common(1)[0][0]
    return figures([row.label for row in test], [commonest] * len(test))


def tfidf(train: list[Row], test: list[Row]) -> Figures:
    """Words and pairs of words seen twice, sublinear TF-IDF, logistic regression (C = 10)."""
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        LogisticRegression(C=10, max_iter=1000),
    )
    model.fit([row.text for row in train], [row.label for row in train])
    return figures([row.label for row in test], [str(it) for it in model.predict([row.text for row in test])])


def baselines(task: Task, data: Path) -> Baselines:
    """Both yardsticks of `task`."""
    splits = rows_by_split(task, data)
    began = time.process_time()
    fitted = tfidf(splits["train"], splits["test"])
    return Baselines(
        majority=majority(splits["train"], splits["test"]),
        tfidf=fitted,
        tfidf_cpu_s=round(time.process_time() - began, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the JSON lines")
    parser.add_argument("--result", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    found = {name: baselines(task, options.data) for name, task in tqdm(TASKS.items(), unit="task")}
    table = Table("task", "rows", "majority acc", "F1", "TF-IDF acc", "F1", title="held-out test split")
    for name, it in found.items():
        shares = (it.majority.accuracy, it.majority.macro_f1, it.tfidf.accuracy, it.tfidf.macro_f1)
        table.add_row(name, str(it.tfidf.rows), *(f"{100 * share:.1f}" for share in shares))
    Console().print(table)
    if options.result:
        text = json.dumps({name: asdict(it) for name, it in found.items()}, indent=2)
        options.result.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
