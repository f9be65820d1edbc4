"""Evaluate adapters **through a running server**: what a client gets is what is measured.

    python adapters/recipes/evaluate.py --url http://localhost:8000 --data DATA [--adapter A] [--write-cards]

Held-out texts go to `POST /generate?adapter=NAME` in lists of 32. Batches of the adapters asked for are
mixed, so that the server has several adapters in work at once. Needs no torch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from baselines import Baselines, Figures, baselines, figures
from cards import ADAPTERS, figures_block, percent, table_row, with_block, with_row
from rich.console import Console
from rich.table import Table
from tasks import RECIPES, TASKS, Row, rows_by_split
from tqdm import tqdm


class RefusalError(Exception):
    """The server answered with an error; the text is its own."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some held-out rows for one adapter, from row `start` on."""

    adapter: str
    start: int
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """How to reach the server."""

    url: str
    api_key: str | None = None
    timeout_s: float = 300.0

    def ask(self, adapter: str, texts: list[str]) -> list[str]:
        """The label the server gives to each text."""
        body = json.dumps({"inputs": texts, "parameters": {"details": True}}).encode()
        where = f"{self.url.rstrip('/')}/generate?adapter={urllib.parse.quote(adapter)}"
        headers = {"content-type": "application/json"}
        if self.api_key:
            headers["authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(where, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                records = json.load(answer)
        except urllib.error.HTTPError as refused:
            said = refused.read().decode("utf-8", "replace")
            raise RefusalError(f"{adapter}: {refused.code} {said}") from refused
        if len(records) != len(texts):
            raise RefusalError(f"{adapter}: {len(texts)} texts sent, {len(records)} answers came back")
        return [str(record["generated_text"]) for record in records]


def batches_of(adapter: str, rows: list[Row], batch_rows: int) -> Iterator[Batch]:
    for start in range(0, len(rows), batch_rows):
        yield Batch(adapter, start, tuple(rows[start : start + batch_rows]))


def mixed(streams: list[Iterator[Batch]]) -> Iterator[Batch]:
    """One batch of each adapter in turn."""
    for turn in itertools.zip_longest(*streams):
        yield from (batch for batch in turn if batch is not None)


def answers(client: Client, held_out: dict[str, list[Row]], batch_rows: int, in_flight: int) -> dict[str, list[str]]:
    """The server's label for every row of every adapter, in the order of the rows."""
    found = {adapter: [""] * len(rows) for adapter, rows in held_out.items()}
    jobs = list(mixed([batches_of(adapter, rows, batch_rows) for adapter, rows in held_out.items()]))

    def send(batch: Batch) -> tuple[Batch, list[str]]:
        return batch, client.ask(batch.adapter, [row.text for row in batch.rows])

    with (
        ThreadPoolExecutor(in_flight) as pool,
        tqdm(total=sum(map(len, held_out.values())), unit="row") as bar,
    ):
        for batch, labels in pool.map(send, jobs):
            found[batch.adapter][batch.start : batch.start + len(labels)] = labels
            bar.update(len(labels))
    return found


def show(scored: dict[str, Figures], yardsticks: dict[str, Baselines]) -> None:
    table = Table("adapter", "rows", "accuracy", "macro-F1", "TF-IDF acc", "F1", "majority acc", "F1")
    for adapter, it in scored.items():
        other = yardsticks[adapter]
        measured = (it, other.tfidf, other.majority)
        shares = [share for each in measured for share in (each.accuracy, each.macro_f1)]
        table.add_row(adapter, str(it.rows), *map(percent, shares))
    Console().print(table)


def write_cards(base: str, scored: dict[str, Figures], yardsticks: dict[str, Baselines]) -> None:
    """Put the figures into the adapters' cards and into the table of `adapters/README.md`."""
    overview = ADAPTERS / "README.md"
    table = overview.read_text(encoding="utf-8")
    for adapter, it in scored.items():
        majority, tfidf = yardsticks[adapter].majority, yardsticks[adapter].tfidf
        path = ADAPTERS / base / adapter / "README.md"
        block = figures_block("through the server", it, majority, tfidf)
        path.write_text(with_block(path.read_text(encoding="utf-8"), block), encoding="utf-8")
        table = with_row(table, table_row(RECIPES[base, adapter], it, majority, tfidf))
    overview.write_text(table, encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    it = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    it.add_argument("--url", default="http://localhost:8000")
    it.add_argument("--data", type=Path, required=True, help="folder with the JSON lines")
    it.add_argument("--base", default="demo-llama", help="the base the server holds: demo-llama or demo-t5")
    it.add_argument("--adapter", action="append", help="a shipped adapter; may be repeated (default: all of the base)")
    it.add_argument("--limit", type=int, help="only the first N held-out rows of each; figures are then not for cards")
    it.add_argument("--batch-rows", type=int, default=32)
    it.add_argument("--in-flight", type=int, default=2, help="batches sent at once")
    it.add_argument("--api-key", help="sent as a bearer token")
    it.add_argument("--write-cards", action="store_true", help="put the figures into the adapters' cards")
    return it


def main(arguments: list[str] | None = None) -> dict[str, Figures]:
    options = parser().parse_args(arguments)
    if options.write_cards and options.limit:
        raise SystemExit("--write-cards wants the whole held-out split; drop --limit")
    known = [name for base, name in RECIPES if base == options.base]
    chosen = options.adapter or known
    if unknown := sorted(set(chosen) - set(known)):
        raise SystemExit(f"no recipe for {', '.join(unknown)} on {options.base}; there is {', '.join(known)}")
    tasks = {name: TASKS[RECIPES[options.base, name].task] for name in chosen}
    held_out = {name: rows_by_split(task, options.data)["test"][: options.limit] for name, task in tasks.items()}
    client = Client(url=options.url, api_key=options.api_key)
    began = time.monotonic()
    try:
        found = answers(client, held_out, options.batch_rows, options.in_flight)
    except (RefusalError, urllib.error.URLError) as error:
        raise SystemExit(str(error)) from error
    print(f"{sum(map(len, found.values()))} rows in {time.monotonic() - began:.1f} s", file=sys.stderr)
    scored = {name: figures([row.label for row in held_out[name]], labels) for name, labels in found.items()}
    yardsticks = {name: baselines(tasks[name], options.data) for name in chosen}
    show(scored, yardsticks)
    if options.write_cards:
        write_cards(options.base, scored, yardsticks)
    return scored


if __name__ == "__main__":
    main()
