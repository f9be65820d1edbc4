"""What a check of a GPU finds, section by section: facts, checks that pass or fail, and tables of figures.

Read and written as JSON; `table` is the same for people, ready for LOG.md. Knows no torch.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

Value = str | int | float | bool | None
State = Literal["done", "failed", "left out"]
Group = Literal["facts", "correctness", "kernels", "bench"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that holds or does not; `found` is the error found, beside what is allowed."""

    name: str
    passed: bool
    found: float | None = None
    allowed: float | None = None
    note: str = ""


def bounded(name: str, found: float, allowed: float, note: str = "") -> Check:
    """The check that an error is no larger than what is allowed; NaN is larger than everything."""
    return Check(name=name, passed=found <= allowed, found=found, allowed=allowed, note=note)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A table of what was measured, and the sentences that belong to it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a part gives back."""

    facts: tuple[tuple[str, Value], ...] = ()
    checks: tuple[Check, ...] = ()
    figures: tuple[Figures, ...] = ()
    left_out: tuple[str, ...] = ()  # what was not looked at, and why


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part that was run, or why it was not: `reason` says so where its state is not "done"."""

    name: str
    group: Group
    state: State
    seconds: float = 0.0
    reason: str = ""
    found: Found = Found()

    @property
    def is_wrong(self) -> bool:
        """Whether something is known to be incorrect, or a part that should have told broke down."""
        broke = self.state == "failed" and self.group == "correctness"
        return broke or not all(check.passed for check in self.found.checks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """One run of the command."""

    date: str
    commit: str
    command: str
    device: str
    is_quick: bool
    seconds: float
    sections: tuple[Section, ...]

    @property
    def is_wrong(self) -> bool:
        """Whether the command ends with a failure."""
        return any(section.is_wrong for section in self.sections)

    def file(self, folder: Path) -> None:
        """Write ``results.json`` and ``table.md``, in place of those that are there."""
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "results.json", json.dumps(_plain(asdict(self)), indent=1, allow_nan=False))
        _write(folder / "table.md", table(self))


def write_section(section: Section, path: Path) -> None:
    """So that whoever reads the path finds the whole section or none."""
    _write(path, json.dumps(_plain(asdict(section)), allow_nan=False))


def _write(path: Path, text: str) -> None:
    beside = path.with_suffix(".part")
    beside.write_text(text)
    beside.replace(path)


def read_section(path: Path) -> Section:
    """What `write_section` wrote."""
    fields = json.loads(path.read_text())
    found = fields.pop("found")
    return Section(
        **fields,
        found=Found(
            facts=tuple((name, value) for name, value in found["facts"]),
            checks=tuple(Check(**check) for check in found["checks"]),
            figures=tuple(
                Figures(
                    title=one["title"],
                    columns=tuple(one["columns"]),
                    rows=tuple(map(tuple, one["rows"])),
                    notes=tuple(one["notes"]),
                )
                for one in found["figures"]
            ),
            left_out=tuple(found["left_out"]),
        ),
    )


def told(section: Section) -> str:
    """A section as it is said at the terminal while the others run."""
    lines = [f"== {section.name} ({section.group}): {section.state}, {section.seconds:.1f} s"]
    if section.reason:
        lines.append(f"   {section.reason}")
    lines += [f"   {name}: {written(value)}" for name, value in section.found.facts]
    lines += [f"   {_verdict(check)}" for check in section.found.checks]
    lines += [f"   not checked: {what}" for what in section.found.left_out]
    for one in section.found.figures:
        lines += ["", *_lined_up(one), *(f"   - {note}" for note in one.notes)]
    return "\n".join(lines)


def table(results: Results) -> str:
    """Everything as Markdown."""
    num_checks = sum(len(section.found.checks) for section in results.sections)
    num_failed = sum(not check.passed for section in results.sections for check in section.found.checks)
    lines = [
        f"## {results.date}: gpu-check{' --quick' if results.is_quick else ''}",
        "",
        f"- commit: {results.commit}",
        f"- command: `{results.command}`",
        f"- {num_checks} checks, {num_failed} failed; {results.seconds:.0f} s in all",
    ]
    for section in results.sections:
        lines += [f"- {name}: {written(value)}" for name, value in section.found.facts]
    for section in results.sections:
        if section.state != "done":
            lines.append(f"- {section.name}: {section.state}: {section.reason}")
        lines += [f"- {section.name}: not checked: {what}" for what in section.found.left_out]
    for section in results.sections:
        if section.found.checks:
            rows = [_check_row(check) for check in section.found.checks]
            lines += ["", f"### {section.name}", "", *_markdown(("check", "", "error", "allowed", "note"), rows)]
        for one in section.found.figures:
            lines += ["", f"### {one.title}", "", *_markdown(one.columns, one.rows)]
            lines += ["", *(f"- {note}" for note in one.notes)] if one.notes else []
    return "\n".join([*lines, "", "- verdict: (one sentence: what this shows, and what is done about it)", ""])


def written(value: Value) -> str:
    """A value as people read it: four significant digits, a dash for nothing."""
    if value is None or (isinstance(value, float) and not isfinite(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _verdict(check: Check) -> str:
    error = "" if check.found is None else f": {check.found:.2g}"
    bound = "" if check.allowed is None else f" (allowed {check.allowed:.2g})"
    note = f"; {check.note}" if check.note else ""
    return f"{'ok  ' if check.passed else 'FAIL'} {check.name}{error}{bound}{note}"


def _check_row(check: Check) -> tuple[Value, ...]:
    return check.name, "ok" if check.passed else "FAILED", check.found, check.allowed, check.note


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Value]]) -> list[str]:
    cells = [[written(value).replace("|", "/") for value in row] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *cells)]


def _lined_up(one: Figures) -> list[str]:
    cells = [list(one.columns), *([written(value) for value in row] for row in one.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = ["   " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return [f"   {one.title}", *rows]


def _plain(value: Any) -> Any:
    """The same without NaN and infinities, which JSON does not have: null in their place."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
