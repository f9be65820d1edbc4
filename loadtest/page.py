"""One page from many results: targets first, then each workload's question, table, plot and verdicts.

The page stands alone (styles and pictures are in it, no script). Failures are shown as plainly as successes: a
target nobody has measured is listed too, and a run on a busy machine says so.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

from loadtest.figures import plots_of
from loadtest.machine import Provenance
from loadtest.plots import svg
from loadtest.report import Cell, Report, load_report, written
from loadtest.targets import NOT_JUDGED, QUESTIONS, Target, Verdict, targets, verdicts

NOTED = re.compile(r"(?P<figure>.*), target (?P<goal>[^:]+): (?P<judgement>met|missed|not judged)(: .*)?$")
"""A note that holds a figure against a target, as `loadtest.targets` writes it."""

BASE_OPTION = re.compile(r"--base[= ](\S+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A result and the folder it was filed in."""

    folder: Path
    report: Report

    @property
    def origin(self) -> Provenance:
        """Where it comes from."""
        assert self.report.provenance is not None, "a filed report is dated"
        return self.report.provenance

    @property
    def base(self) -> str:
        """The base's name, without the folders it lies in."""
        said = BASE_OPTION.search(self.origin.command)
        name = self.origin.base or (said[1] if said else "0.1b")
        return Path(name).name

    @property
    def is_quick(self) -> bool:
        """Whether it was a quick run, which proves nothing."""
        return self.origin.is_quick


def find_results(places: Iterable[Path]) -> list[Result]:
    """The results in these folders, or in folders in them, oldest first. ValueError if there are none."""
    named = list(places)
    files = {path.resolve(): path for place in named for path in place.glob("**/result.json")}
    results = [Result(folder=path.parent, report=load_report(path.parent)) for path in files.values()]
    if not results:
        raise ValueError(f"no result.json under {', '.join(map(str, named))}: run a workload first")
    return sorted(results, key=lambda result: (result.origin.date, result.folder.name))


def page(results: Sequence[Result]) -> str:
    """The whole page as HTML."""
    order = list(QUESTIONS)
    known = sorted(results, key=lambda one: order.index(one.report.name) if one.report.name in order else len(order))
    newest = {(one.report.name, one.base): one for one in known}
    style = (Path(__file__).parent / "page.css").read_text()
    sections = "".join(
        _section(name, list(group), newest) for name, group in groupby(known, key=lambda one: one.report.name)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>peft-serve: load tests</title><style>{style}</style></head><body><main>"
        f"{_head(results)}{_scorecard(list(newest.values()))}{sections}{FOOTER}</main></body></html>\n"
    )


FOOTER = (
    "<footer>Ratios taken within one run are the claims; an absolute figure means something beside its machine only. "
    "TTFT: time to the first token. TPOT: mean time of each later one. rho: offered load over the base model's "
    "capacity. How each figure is taken: <code>loadtest/README.md</code>.</footer>"
)


def _head(results: Sequence[Result]) -> str:
    facts: list[tuple[str, Callable[[Provenance], str]]] = [
        ("machine", lambda origin: origin.machine),
        ("software", lambda origin: origin.software),
        ("commit", lambda origin: origin.commit),
        ("measured", lambda origin: origin.date),
    ]
    lines = "".join(
        f"<dt>{name}</dt><dd>{escape(_listed([read(one.origin) for one in results]))}</dd>" for name, read in facts
    )
    return (
        "<h1>peft-serve: load tests</h1>"
        '<p class="lead">One resident base model, many PEFT adapters in one batch: what that costs, against the '
        "targets set beforehand and against peft's own loops on the same machine.</p>"
        f'<div class="card"><dl class="facts">{lines}</dl>{_warnings(results)}</div>'
    )


def _listed(values: Iterable[str]) -> str:
    distinct = list(dict.fromkeys(values))
    return "; ".join(distinct) if len(distinct) <= 3 else f"{distinct[0]} to {distinct[-1]} ({len(distinct)} of them)"


def _warnings(results: Sequence[Result]) -> str:
    told = []
    busy = [one for one in results if one.origin.is_busy]
    if busy:
        cores = ", ".join(f"{one.report.name} ({one.origin.others:g} cores)" for one in busy)
        told.append(f"The machine was doing something else when these began: {cores}. Their figures are not claims.")
    quick = sorted({one.report.name for one in results if one.is_quick})
    if quick:
        told.append(f"Quick runs, which show that things run and prove nothing: {', '.join(quick)}.")
    changed = sorted({one.report.name for one in results if one.origin.commit.endswith("+ changes")})
    if changed:
        told.append(f"Measured on a working tree that differed from its commit: {', '.join(changed)}.")
    return "".join(f'<div class="warning">{escape(line)}</div>' for line in told)


def _scorecard(newest: Sequence[Result]) -> str:
    bases = sorted({one.base for one in newest})
    found = {(verdict.target.words, one.base): (verdict, one) for one in newest for verdict in verdicts(one.report)}
    judged = [verdict.judgement for verdict, _ in found.values()]
    open_targets = [t for t in targets() if all((t.words, base) not in found for base in bases)]
    counts = {"met": judged.count("met"), "missed": judged.count("missed")}
    counts["not measured"] = judged.count("not measured") + len(open_targets)
    tally = "".join(_chip(word, f"{count} {word}") for word, count in counts.items())
    heads = "".join(f'<th scope="col">{escape(base)}</th>' for base in bases)
    lines = "".join(
        f'<tr><td><a href="#{target.workload}">{target.workload.upper()}</a></td><td>{escape(target.words)}</td>'
        f"<td>{_goal(target)}</td>{''.join(_reached(found.get((target.words, base))) for base in bases)}</tr>"
        for target in targets()
    )
    return (
        f'<section id="targets"><h2>Targets</h2><p class="question">Set before measuring. Newest run of each workload, '
        f'by base model.</p><div class="tally">{tally}</div><div class="scroll"><table class="targets"><thead><tr>'
        f'<th scope="col">test</th><th scope="col">figure</th><th scope="col">target</th>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div></section>"
    )


def _goal(target: Target) -> str:
    return f"{'&le;' if target.is_ceiling else '&ge;'} {target.goal:g}"


def _reached(found: tuple[Verdict, Result] | None) -> str:
    if found is None or found[0].judgement == "not measured":
        return f"<td>{_chip('not measured', 'not measured')}</td>"
    verdict, one = found
    quick = "quick run: " if one.is_quick else ""
    return f"<td>{quick}{verdict.value:.3g} {_judgement(one, verdict)}</td>"


def _judgement(one: Result, verdict: Verdict) -> str:
    is_told = not one.is_quick or verdict.target.is_exact
    return _chip(NOT_JUDGED, NOT_JUDGED) if not is_told else _chip(verdict.judgement, verdict.judgement)


def _chip(kind: str, words: str) -> str:
    return f'<span class="chip {kind.replace(" ", "-")}">{escape(words)}</span>'


def _section(name: str, group: Sequence[Result], newest: dict[tuple[str, str], Result]) -> str:
    heading, question = QUESTIONS.get(name, (name, ""))
    current = [one for one in group if newest[name, one.base] is one]
    older = [one for one in reversed(group) if newest[name, one.base] is not one]
    folded = ""
    if older:
        runs = f"{len(older)} older run{'s' if len(older) > 1 else ''}"
        folded = f"<details><summary>{runs}</summary>{''.join(map(_result, older))}</details>"
    return (
        f'<section id="{escape(name)}"><h2>{escape(heading)}</h2><p class="question">{escape(question)}</p>'
        f"{''.join(map(_result, current))}{folded}</section>"
    )


def _result(one: Result) -> str:
    report, origin = one.report, one.origin
    judged = "".join(
        f"<li>{escape(verdict.target.words)}: {verdict.value:.3g}, target {_goal(verdict.target)} "
        f"{_judgement(one, verdict)}</li>"
        for verdict in verdicts(report)
        if verdict.judgement != "not measured"
    )
    told = {(f"{verdict.value:.3f}", f"{verdict.target.goal:g}") for verdict in verdicts(report)}
    notes = judged + "".join(_note(note) for note in report.notes if _said(note) not in told)
    pictures = "".join(f"<figure>{svg(plot)}</figure>" for plot in plots_of(report))
    pictures = f'<div class="figures">{pictures}</div>' if pictures else ""
    return (
        f"<h3>{escape(one.base)}, {escape(origin.date)}{' (quick)' if one.is_quick else ''}</h3>"
        f"{_table(report.title, report.columns, report.rows)}{pictures}"
        f"{f'<ul class=notes>{notes}</ul>' if notes else ''}"
        f'<p class="origin">{escape(origin.machine)}; commit {escape(origin.commit)}; '
        f"<code>{escape(origin.command)}</code></p>"
    )


def _said(note: str) -> tuple[str, str] | None:
    """The figure and the target of a note that holds one against the other; None for any other note."""
    match = NOTED.match(note)
    return None if match is None else (match["figure"].rpartition(" = ")[2], match["goal"].removeprefix("at most "))


def _note(note: str) -> str:
    said = NOTED.match(note)
    if said is None:
        return f"<li>{escape(note)}</li>"
    figure, goal, judgement = (escape(said[name]) for name in ("figure", "goal", "judgement"))
    return f"<li>{figure}, target {goal} {_chip(judgement, judgement)}</li>"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    heads = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(written(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><caption>{escape(title)}</caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )
