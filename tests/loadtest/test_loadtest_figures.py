"""Measures, reports and their files."""

from __future__ import annotations

import io
from math import isnan, nan
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from loadtest.machine import Provenance, command_line, commit, machine, software
from loadtest.measure import percentile, ratio, steady_window, summarise, tokens_per_s
from loadtest.outcome import UNFINISHED, Outcome, load_outcomes, save_outcomes
from loadtest.plots import Plot
from loadtest.report import Report, load_report, log_entry, markdown_table, written
from loadtest.server import metrics_delta, parse_metrics
from loadtest.stage import palindrome

ORIGIN = Provenance(date="2026-11-21 03:00", machine="m", software="s", commit="c", command="python -m loadtest w9")


def outcome(index: int, *, due_s: float, times: tuple[float, ...], error: str | None = None) -> Outcome:
    return Outcome(
        index=index,
        adapter="",
        due_s=due_s,
        sent_s=due_s + 0.01,
        end_s=times[-1] if times else due_s,
        token_times_s=times,
        error=error,
    )


@pytest.mark.parametrize("percent", [0, 1, 50, 90, 99, 100])
def test_percentiles_are_numpys(percent: float) -> None:
    values = list(np.random.default_rng(0).random(37))
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_percentile_of_nothing_is_nan() -> None:
    assert isnan(percentile([], 50))
    assert percentile([2.0], 99) == 2.0


def test_latencies_count_from_when_the_request_was_due() -> None:
    one = outcome(0, due_s=1.0, times=(1.5, 1.7, 1.9))
    assert one.ttft_s == pytest.approx(0.5)
    assert one.tpot_s == pytest.approx(0.2)
    assert one.e2e_s == pytest.approx(0.9)
    assert outcome(0, due_s=1.0, times=(1.5,)).tpot_s is None


def test_summary_of_a_run() -> None:
    outcomes = [
        outcome(0, due_s=0.0, times=(1.0, 2.0, 3.0)),
        outcome(1, due_s=2.0, times=(2.5, 3.5)),
        outcome(2, due_s=3.0, times=(), error="status 500"),
        outcome(3, due_s=3.5, times=(9.5,), error=UNFINISHED),
    ]
    found = summarise(outcomes, window=(1.5, 3.75), unloaded_ttft_s=0.15)
    assert found.tokens_per_s == pytest.approx(4 / 2.25)  # at 2, 3, 2.5 and 3.5
    assert found.requests_per_s == pytest.approx(2 / 2.25)
    assert (found.num_requests, found.num_ok, found.num_failed) == (4, 2, 1)
    assert found.errors == {"status 500": 1, UNFINISHED: 1}
    assert found.ttft_p50_s == pytest.approx(0.75)
    assert found.share_in_time == 0.25  # one of four within 0.75 s; failures are not in time
    assert found.max_send_lag_s == pytest.approx(0.01)


def test_the_steady_window_leaves_out_start_and_end() -> None:
    outcomes = [outcome(number, due_s=float(number), times=(number + 0.5,)) for number in range(11)]
    begin, end = steady_window(outcomes)
    assert (begin, end) == (pytest.approx(2.002), pytest.approx(10.01))
    assert tokens_per_s(outcomes, (begin, end)) == pytest.approx(8 / (end - begin))


def test_nothing_measured_is_nan_and_not_an_error() -> None:
    found = summarise([])
    assert isnan(found.tokens_per_s)
    assert isnan(found.share_in_time)
    assert isnan(ratio(1.0, 0.0))
    assert isnan(ratio(1.0, nan))


def test_outcomes_survive_their_file(tmp_path: Path) -> None:
    outcomes = [outcome(0, due_s=0.0, times=(1.0, 2.0)), outcome(1, due_s=1.0, times=(), error="timeout")]
    save_outcomes(outcomes, tmp_path / "outcomes.jsonl")
    assert load_outcomes(tmp_path / "outcomes.jsonl") == outcomes


@pytest.mark.parametrize("ticks", [(), ("one", "two")])
def test_a_report_is_filed_shown_and_read_back(tmp_path: Path, ticks: tuple[str, ...]) -> None:
    plot = Plot(title="t", x_label="x", y_label="y", series={"a": ((0.0, 1.0), (1.0, nan))}, ticks=ticks, level=1.0)
    report = Report(
        name="w9", title="W9: a test", columns=("n", "ratio"), rows=((1, 0.97321), (2, nan)), notes=("fine",), plot=plot
    ).file(tmp_path / "run", ORIGIN)
    assert (tmp_path / "run" / "plot.png").read_bytes().startswith(b"\x89PNG")
    entry = (tmp_path / "run" / "entry.md").read_text()
    assert entry == log_entry(report)
    for part in ("## 2026-11-21 03:00: w9", "- commit: c", "`python -m loadtest w9`", "| 1 | 0.9732 |", "| 2 | - |"):
        assert part in entry
    assert log_entry(load_report(tmp_path / "run")) == entry
    screen = io.StringIO()
    report.show(Console(file=screen, width=100))
    assert "0.9732" in screen.getvalue()
    assert "- fine" in screen.getvalue()


def test_cells_and_tables() -> None:
    assert [written(cell) for cell in (3, "x", 1234.5678, 0.000123456, nan)] == ["3", "x", "1235", "0.0001235", "-"]
    assert markdown_table(("a", "b"), ((1, 2.0),)) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_provenance_names_machine_and_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "cores" in machine()
    assert "torch" in software()
    assert commit()
    monkeypatch.chdir(tmp_path)
    assert (
        command_line(["w1", "--base", f"{tmp_path}/loadtest/work/b"]) == "python -m loadtest w1 --base loadtest/work/b"
    )
    again = "python -m loadtest w11 --term 'low rank 8'"
    assert command_line(["w11", "--term", "low rank 8"]) == again, "to be pasted and run"


def test_metrics_pages_are_read_and_compared() -> None:
    before = parse_metrics('# HELP a b\na_total{x="y z",n="1"} 3.0\nb 1e3\nc NaN\n')
    assert before['a_total{x="y z",n="1"}'] == 3.0
    assert before["b"] == 1000.0
    after = {**before, 'a_total{x="y z",n="1"}': 5.0, "new": 2.0}
    del before["c"], after["c"]
    assert metrics_delta(before, after) == {'a_total{x="y z",n="1"}': 2.0, "new": 2.0}


def test_phases_forwards_and_backwards() -> None:
    assert palindrome(["a", "b"]) == ["a", "b", "b", "a"]
