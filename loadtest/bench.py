"""bench: the short honest subset: a few workloads one after the other, then one page about them.

Each step is a command of its own, run as one would by hand in a process of its own, so that every figure has a
command that gives it again and no step inherits another's memory or threads. A step that fails is told and does not
stop the others.
"""

import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loadtest.arguments import whole_from
from loadtest.filing import new_folder
from loadtest.page import Result, find_results, page
from loadtest.targets import verdicts

WORK = Path("loadtest/work")
PROGRAM = (sys.executable, "-m", "loadtest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command and about how long it takes on two cores, for the time left."""

    words: tuple[str, ...]
    about_s: float


def steps() -> tuple[Step, ...]:
    """The subset; phases are long enough for ratios that hold to some percent, not for a claim of one percent."""
    return (
        Step(words=("bound", "--quick"), about_s=40.0),
        Step(words=("w1", "--adapters", "8", "--duration", "3"), about_s=105.0),
        Step(words=("w4", "--adapters", "16", "--duration", "4", "--concurrency", "16"), about_s=65.0),
        Step(words=("w5", "--adapters", "8", "--requests", "12", "--batch-size", "12"), about_s=165.0),
        Step(words=("w6", "--quick"), about_s=75.0),
    )


def add_options(parser: ArgumentParser) -> None:
    """The options of ``bench``."""
    parser.add_argument(
        "--base",
        default="0.1b",
        help="tiny, 0.1b, 0.5b (random weights, -llama behind it for that architecture) or a model folder",
    )
    parser.add_argument("--out", type=Path, default=Path("loadtest/results"), help="where results are filed")
    parser.add_argument("--work", type=Path, default=WORK, help="where bases and adapters are made")
    threads = "torch threads of the server, of peft and of the steps here"
    parser.add_argument("--threads", type=whole_from(1), help=threads)
    parser.add_argument("--only", action="append", default=[], metavar="COMMAND", help="only this step (repeatable)")


def run_parsed(parsed: Namespace, console: Console) -> int:
    """Run ``bench`` as its options say; the exit status."""
    known = [step.words[0] for step in steps()]
    strangers = [name for name in parsed.only if name not in known]
    if strangers:
        raise ValueError(f"--only {strangers[0]} names no step; there are {', '.join(known)}")
    chosen = [step for step in steps() if not parsed.only or step.words[0] in parsed.only]
    with new_folder(parsed.out, "bench", datetime.now()) as folder:
        return _run_into(folder, chosen, parsed, console)


def _run_into(folder: Path, chosen: Sequence[Step], parsed: Namespace, console: Console) -> int:
    common = ["--base", parsed.base, "--out", str(folder)]
    if parsed.work != WORK:
        common += ["--work", str(parsed.work)]
    if parsed.threads is not None:
        common += ["--threads", str(parsed.threads)]
    failed = run_steps(chosen, common, console)
    results = find_results([folder])
    (folder / "report.html").write_text(page(results))
    show_summary(results, console)
    for name in failed:
        console.print(f"[red]{name} failed[/red]: what it said is above")
    console.print(f"\nThe report: {folder / 'report.html'}", soft_wrap=True)
    return 1 if failed else 0


def run_steps(
    chosen: Sequence[Step],
    common: Sequence[str],
    console: Console,
    *,
    program: Sequence[str] = PROGRAM,
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Run each step with the `common` options after its own; answers with the names of those that failed."""
    failed = []
    began, planned = clock(), 0.0
    for number, step in enumerate(chosen):
        left = time_left(chosen[number:], spent_s=clock() - began, planned_s=planned)
        console.rule(f"{number + 1}/{len(chosen)} {step.words[0]}: about {minutes(left)} left", align="left")
        done = subprocess.run([*program, *step.words, *common], check=False)
        if done.returncode:
            failed.append(step.words[0])
        planned += step.about_s
    return failed


def time_left(ahead: Sequence[Step], *, spent_s: float, planned_s: float) -> float:
    """Seconds that the steps ahead will take, if this machine keeps to its pace so far (`spent_s` for what was
    planned to take `planned_s`)."""
    pace = spent_s / planned_s if planned_s else 1.0
    return pace * sum(step.about_s for step in ahead)


def minutes(seconds: float) -> str:
    """A time as people say it."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def show_summary(results: Sequence[Result], console: Console) -> None:
    """Every target that these results measure, met or missed, and what speaks against believing it."""
    table = Table(title="Against the targets")
    for column in ("test", "base", "figure", "target", "here", ""):
        table.add_column(column, justify="right" if column in ("target", "here") else "left")
    colours = {"met": "green", "missed": "red"}
    for result in results:
        for verdict in verdicts(result.report):
            judgement, target = verdict.judgement, verdict.target
            if judgement in colours:
                sign = "<=" if target.is_ceiling else ">="
                judged = f"[{colours[judgement]}]{judgement}[/]"
                here = f"{verdict.value:.3g}"
                table.add_row(result.report.name, result.base, target.words, f"{sign} {target.goal:g}", here, judged)
    console.print(table)
    doubtful = [result.report.name for result in results if result.origin.is_busy]
    if doubtful:
        console.print(
            f"[yellow]others used the machine when these began, so they are no claims: {', '.join(doubtful)}[/]"
        )
    quick = [result.report.name for result in results if result.is_quick]
    if quick:
        console.print(f"quick runs, which prove nothing: {', '.join(quick)}")
