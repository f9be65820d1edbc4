"""What the workloads ask, and the targets: one table, each target with the way its figure is read from a result.

A result that lacks the rows or columns a target asks for leaves it unmeasured; nothing is guessed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isnan, nan
from typing import Literal

from loadtest.report import Cell, Report

Row = Mapping[str, Cell]
Read = Callable[[Report], float]
Judgement = Literal["met", "missed", "not measured"]

QUESTIONS: Mapping[str, tuple[str, str]] = {
    "bound": ("The bound", "How near is a step of the base alone to what this machine's memory and arithmetic allow?"),
    "kernels": ("Kernels", "How near is each product of the base, by each way to compute it, to what memory allows?"),
    "w1": ("W1: many adapters", "Does throughput hold as the traffic spreads over n adapters?"),
    "w2": ("W2: load", "What latency at what load?"),
    "w3": ("W3: bursts and skew", "What do bursts and uneven popularity do to latency?"),
    "w4": ("W4: variety in a batch", "What does it cost that the rows of one batch use different adapters?"),
    "w5": ("W5: against peft", "Is this faster than the loops one would write with peft, and does it say the same?"),
    "w6": ("W6: cold adapters", "What does it cost when every request names an adapter never seen before?"),
    "w7": ("W7: a small cache", "How often is an adapter at hand when only a part of them fits into memory?"),
    "w8": ("W8: mixed methods", "Do different methods in one batch cost more than LoRA alone?"),
    "w9": ("W9: uploads", "Do uploads, re-uploads and deletes disturb the requests that run?"),
    "w11": ("W11: each kind of term", "What does each kind of adapter term cost a step, beside its byte bound?"),
    "w13": ("W13: exactness", "Is every row of every mixed batch, under churn, what peft says on its own?"),
    "overhead": ("Overhead", "Is base traffic as fast on a server that holds adapters as on one without?"),
    "ceiling": ("Ceiling", "How much can the HTTP side carry, whatever the model?"),
    "edge": ("The edge", "What becomes of the others when clients misbehave, or when there are too many of them?"),
    "policies": ("Scheduling policies", "What does each order of the queue do for whom, and what does it cost?"),
    "cache-replay": ("Caches, offline", "Which hit rate would another eviction policy or size have had?"),
    "simulate": ("Many replicas", "Which placement serves adapters best on 2 to 1,000 simulated replicas?"),
    "compare": ("Peers", "How do others fare on the same trace, and do they say the same?"),
    "beside": ("Side by side", "Is this faster than peft, llama.cpp and others, row by row, and with what memory?"),
    "replay": ("Replay", "How does one saved trace run?"),
}
"""Heading and question of each workload, in the order of a report."""


NOT_JUDGED, QUICK = "not judged", "a quick run shows that it runs, and proves nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A figure of workload `workload` that is to reach `goal`, or to stay at or below it if `is_ceiling`."""

    workload: str
    words: str
    goal: float
    read: Read
    is_ceiling: bool = False
    is_exact: bool = False  # a count of what went wrong: a quick run says it as well as a long one

    def judge(self, value: float) -> Judgement:
        """Whether a figure meets the target; NaN is not measured."""
        if isnan(value):
            return "not measured"
        return "met" if (value <= self.goal if self.is_ceiling else value >= self.goal) else "missed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A target and what was reached; NaN if it was not measured."""

    target: Target
    value: float

    @property
    def judgement(self) -> Judgement:
        """Met, missed or not measured."""
        return self.target.judge(self.value)

    @property
    def sentence(self) -> str:
        """The figure beside its target, and what follows."""
        goal = f"{'at most ' if self.target.is_ceiling else ''}{self.target.goal:g}"
        if isnan(self.value):
            return f"{self.target.words}: not measured (target {goal})"
        return f"{self.target.words} = {self.value:.3f}, target {goal}: {self.judgement}"

    @property
    def unjudged(self) -> str:
        """The same of a quick run."""
        judged = self.sentence
        if isnan(self.value) or self.target.is_exact:
            return judged
        return f"{judged.removesuffix(self.judgement)}{NOT_JUDGED}: {QUICK}"


def rows_of(report: Report) -> list[Row]:
    """The table's rows by column."""
    return [dict(zip(report.columns, row, strict=False)) for row in report.rows]


def figures(report: Report, column: str, where: Callable[[Row], bool] = lambda _: True) -> list[float]:
    """The numbers of a column in the rows that fit; rows without that column, or without a number there, do not."""
    found = (row.get(column) for row in rows_of(report) if where(row))
    return [float(cell) for cell in found if isinstance(cell, int | float) and not isnan(cell)]


def lowest(column: str, where: Callable[[Row], bool] = lambda _: True) -> Read:
    """The lowest figure of a column in the rows that fit."""
    return lambda report: min(figures(report, column, where), default=nan)


def highest(column: str, where: Callable[[Row], bool] = lambda _: True) -> Read:
    """The highest figure of a column in the rows that fit."""
    return lambda report: max(figures(report, column, where), default=nan)


def _number(row: Row, column: str) -> float:
    cell = row.get(column)
    return float(cell) if isinstance(cell, int | float) else nan


def _saturated(least: int, most: int) -> Callable[[Row], bool]:
    return lambda row: least <= _number(row, "adapters") <= most and _number(row, "rho") > 1


def _many_over_five(report: Report) -> float:
    many = figures(report, "tokens/s", _saturated(2000, 10**9))
    few = figures(report, "tokens/s", _saturated(5, 5))
    return many[0] / few[0] if many and few else nan


def _within_byte_bound(report: Report) -> float:
    """The share of points that cost at most 1.3 times their byte bound and 1 % of a step."""
    told = [row["within target"] for row in rows_of(report) if "within target" in row]
    return told.count("yes") / len(told) if told else nan


def _tail_beside_uploads(report: Report) -> float:
    quiet, busy = (lowest("TPOT p99 ms", _is("phase", phase))(report) for phase in ("quiet", "uploads"))
    return busy / quiet if quiet else nan


def _failures(report: Report) -> float:
    counts = figures(report, "failed") + figures(report, "failed acts")
    return sum(counts) if counts else nan


def _over_best_loop(report: Report) -> float:
    loops = figures(report, "server over it", lambda row: row.get("way") != "server")
    return min(loops, default=nan)


def _overhead(report: Report) -> float:
    blocks = figures(report, "B over A")
    return sum(blocks) / len(blocks) if blocks else nan


def _is(column: str, value: str) -> Callable[[Row], bool]:
    return lambda row: row.get(column) == value


def targets() -> tuple[Target, ...]:
    """Every target, in the order of a report. Each one's words are its own."""
    order = list(QUESTIONS)
    every = (*_of_throughput(), *_of_isolation(), *_of_exactness())
    return tuple(sorted(every, key=lambda target: order.index(target.workload)))


def _of_throughput() -> tuple[Target, ...]:
    thr, over = "thr(n)/thr(0)", "over base"
    return (
        Target(workload="w1", words="thr(1)/thr(0), saturated", goal=0.97, read=lowest(thr, _saturated(1, 1))),
        Target(
            workload="w1", words="thr(n)/thr(0), saturated, n <= 200", goal=0.93, read=lowest(thr, _saturated(2, 200))
        ),
        Target(workload="w1", words="thr(2000)/thr(5), saturated", goal=0.98, read=_many_over_five),
        Target(
            workload="w4",
            words="one adapter for all rows, over the base",
            goal=0.97,
            read=lowest(over, _is("popularity", "identical")),
        ),
        Target(
            workload="w4",
            words="a different adapter in each row, over the base",
            goal=0.93,
            read=lowest(over, _is("popularity", "distinct")),
        ),
        Target(
            workload="w5",
            words="this server over peft's mixed batches",
            goal=3.0,
            read=lowest("server over it", _is("way", "mixed")),
        ),
        Target(workload="w5", words="this server over peft's best loop", goal=1.0, read=_over_best_loop),
        Target(
            workload="w8",
            words="mixed methods over LoRA alone",
            goal=0.97,
            read=lowest("mixed over it", _is("way", "LoRA only")),
        ),
        Target(
            workload="w8",
            words="mixed methods over one task at a time",
            goal=2.0,
            read=lowest("mixed over it", _is("way", "one task at a time")),
        ),
        Target(
            workload="w11",
            words="share of steps within 1.3 times their byte bound and 1 %",
            goal=1.0,
            read=_within_byte_bound,
        ),
    )


def _of_isolation() -> tuple[Target, ...]:
    return (
        Target(
            workload="w6",
            words="TTFT of adapters from the host's memory, over resident ones",
            goal=1.03,
            is_ceiling=True,
            read=highest("TTFT p50 over device", _is("adapters from", "host")),
        ),
        Target(
            workload="w9",
            words="TPOT p99 beside uploads, over none",
            goal=1.05,
            is_ceiling=True,
            read=_tail_beside_uploads,
        ),
        Target(
            workload="w9", words="failures beside uploads", goal=0.0, is_ceiling=True, is_exact=True, read=_failures
        ),
        Target(workload="overhead", words="base traffic beside idle adapters, over none", goal=0.97, read=_overhead),
    )


def _of_exactness() -> tuple[Target, ...]:
    return (
        Target(
            workload="w5",
            words="answers of the server equal to peft's",
            goal=1.0,
            is_exact=True,
            read=lowest("answers equal to single", _is("way", "server")),
        ),
        Target(
            workload="w13",
            words="tokens equal to peft's, under churn and eviction",
            goal=1.0,
            is_exact=True,
            read=lowest("tokens before a difference", _is("method", "all")),
        ),
    )


def verdicts(report: Report) -> list[Verdict]:
    """What a result says about each target of its workload."""
    return [Verdict(target=target, value=target.read(report)) for target in targets() if target.workload == report.name]


def judged(report: Report, *, is_quick: bool = False) -> Report:
    """The same report, its notes led by a sentence for each target of its workload. A quick run judges what
    is exact and no speed."""
    told = (verdict.unjudged if is_quick else verdict.sentence for verdict in verdicts(report))
    return replace(report, notes=(*told, *report.notes))
