"""A report: the table, plot, files and log entry that a workload ends with."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite, isnan, nan
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from loadtest.machine import Provenance
from loadtest.plots import Plot, draw

Cell = str | int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a workload found. `notes` are the sentences that follow from the table (ratios against targets);
    `plot` is drawn beside it; `provenance` is filled in when the report is filed."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    plot: Plot | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance | None = None

    def file(self, folder: Path, provenance: Provenance) -> "Report":
        """Write ``result.json``, ``entry.md`` and ``plot.png`` into `folder`; answers with the dated report."""
        dated = replace(self, provenance=provenance)
        folder.mkdir(parents=True, exist_ok=True)
        kept = json.dumps(_plain(asdict(dated)), indent=2, default=str, allow_nan=False)
        (folder / "result.json").write_text(kept)
        (folder / "entry.md").write_text(log_entry(dated))
        if self.plot is not None:
            draw(self.plot, folder / "plot.png")
        return dated

    def show(self, console: Console) -> None:
        """Print the table and the notes. Where the screen is narrow, the words of a cell go below each other, and what
        does not fit even so comes in further tables, which begin with the same names of the rows."""
        title: str | None = self.title
        for part in _parts(self.columns, self.rows, room=console.width):
            rows = [tuple(written(row[at]) for at in part) for row in self.rows]
            console.print(_table(title, [self.columns[at] for at in part], rows, room=console.width))
            title = None
        for note in self.notes:
            console.print(f"- {note}", highlight=False)


def _table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]], *, room: int) -> Table:
    gap, widths = _layout(columns, rows, room=room)
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0))
    for number, (column, width) in enumerate(zip(columns, widths, strict=True)):
        justify: Literal["left", "right"] = "left" if number == 0 else "right"
        table.add_column(column, justify=justify, overflow="fold", width=width)
    for row in rows:
        table.add_row(*row)
    return table


def _parts(columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, room: int) -> list[list[int]]:
    """The columns of each table, so that no word of a heading is broken: the first ones, which name a row, in every
    table. All in one where that is not enough."""
    texts = [[column, *(written(row[at]) for row in rows)] for at, column in enumerate(columns)]
    least = [_longest_word(text) for text in texts]
    num_names = next((at for at in range(len(columns)) if any(not isinstance(row[at], str) for row in rows)), 0)
    names = [*range(num_names)]
    parts = [names.copy()]
    for at in range(num_names, len(columns)):
        width = sum(least[each] for each in (*parts[-1], at)) + len(parts[-1])
        if width > room and len(parts[-1]) > num_names:
            parts.append(names.copy())
        parts[-1].append(at)
    fits = all(sum(least[at] for at in part) + len(part) - 1 <= room for part in parts)
    return parts if fits else [[*range(len(columns))]]


def _longest_word(text: Sequence[str]) -> int:
    return max(len(word) for cell in text for word in cell.split() or [""])


def _layout(columns: Sequence[str], rows: Sequence[Sequence[str]], *, room: int) -> tuple[int, list[int | None]]:
    """The blanks between columns, and the width of each. What is too wide is broken between words, then headings are
    broken within them, and values only where nothing else is left."""
    texts = [[column, *(row[at] for row in rows)] for at, column in enumerate(columns)]
    wide = [max(map(len, text)) for text in texts]
    by_words = [_longest_word(text) for text in texts]
    by_values = [max((len(word) for cell in text[1:] for word in cell.split()), default=1) for text in texts]
    for gap, least in ((2, by_words), (1, by_words), (1, by_values)):
        left = room - sum(least) - gap * (len(columns) - 1)
        if left < 0:
            continue
        widths: list[int | None] = []
        for most, width in zip(wide, least, strict=True):
            widths.append(min(most, width + left))
            left -= min(most - width, left)
        return gap, widths
    return 1, [None] * len(columns)


def written(cell: Cell) -> str:
    """A cell as people read it: four significant digits, a dash for nothing."""
    if isinstance(cell, float):
        return "-" if isnan(cell) else f"{cell:.4g}"
    return str(cell)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """The same table for LOG.md."""
    lines = [columns, ["---"] * len(columns), *[[written(cell) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def log_entry(report: Report) -> str:
    """An entry for LOG.md, ready to paste but for the verdict."""
    origin = report.provenance
    assert origin is not None, "file the report first"
    lines = [
        f"## {origin.date}: {report.name}",
        "",
        f"- machine: {origin.machine}{_others(origin)}",
        f"- software: {origin.software}",
        f"- commit: {origin.commit}",
        f"- command: `{origin.command}`",
        "",
        f"{report.title}",
        "",
        markdown_table(report.columns, report.rows),
        "",
        *(f"- {note}" for note in report.notes),
        "- verdict: (one sentence: what this shows, and what is done about it)",
        "",
    ]
    return "\n".join(lines)


def _others(origin: Provenance) -> str:
    return f"; others kept {origin.others:g} cores busy when it began" if origin.is_busy else ""


def _plain(value: Any) -> Any:
    """The same without NaN and infinities, which JSON does not have: null in their place."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def load_report(folder: Path) -> Report:
    """Read back what `Report.file` wrote, null in the table as NaN; ValueError if the folder holds no result."""
    path = folder / "result.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no result.json: name a folder that a workload filed its result in")
    try:
        return _read(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{path} is not a result that a workload filed ({problem!r})") from None


def _read(fields: dict[str, Any]) -> Report:
    return Report(
        name=fields["name"],
        title=fields["title"],
        columns=tuple(fields["columns"]),
        rows=tuple(tuple(nan if cell is None else cell for cell in row) for row in fields["rows"]),
        notes=tuple(fields["notes"]),
        plot=None if fields["plot"] is None else Plot.read(fields["plot"]),
        settings=fields["settings"],
        provenance=Provenance(**fields["provenance"]),
    )
