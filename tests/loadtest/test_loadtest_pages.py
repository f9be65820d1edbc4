"""Targets read from results, the page about them, plots, progress bars, and the bench's steps."""

from __future__ import annotations

import io
import os
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from math import nan
from pathlib import Path

import pytest
from rich.console import Console

from loadtest.bench import Step, minutes, run_steps, show_summary, steps, time_left
from loadtest.cli import main
from loadtest.figures import plots_of
from loadtest.machine import Provenance, others_cores
from loadtest.page import find_results, page
from loadtest.plots import LYING, Plot, draw, svg
from loadtest.progress import bar
from loadtest.report import Cell, Report, load_report, written
from loadtest.targets import QUESTIONS, judged, targets, verdicts

NAMESPACES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}

PLOT = Plot(
    title="Tokens & more",
    x_label="way <x>",
    y_label="tokens/s",
    series={"tokens/s": ((0.0, 10.0), (1.0, nan))},
    ticks=("server", "peft"),
    level=5.0,
    level_label="half",
)


def origin(command: str = "python -m loadtest w4 --base 0.1b", **more: object) -> Provenance:
    fields = {"date": "2026-11-21 03:00", "machine": "m <1>", "software": "s", "commit": "abc", "command": command}
    return Provenance(**{**fields, **more})  # type: ignore[arg-type]


def w4(identical: float, distinct: float) -> Report:
    rows = (("base", 200.0, 1.0), ("identical", 200.0 * identical, identical), ("distinct", 200.0 * distinct, distinct))
    return Report(
        name="w4",
        title="W4: sixteen <rows>",
        columns=("popularity", "tokens/s", "over base"),
        rows=rows,
        notes=("identical over base = 0.980, target 0.97: met", "more = 0.600, target 0.93: missed", "by <hand>"),
        plot=PLOT,
    )


def w1(*rows: tuple[int, float, float, float]) -> Report:
    return Report(name="w1", title="W1", columns=("adapters", "rho", "tokens/s", "thr(n)/thr(0)"), rows=rows)


class Balance(HTMLParser):
    """Checks that every element that is opened is closed in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_targets_are_read_from_the_rows() -> None:
    found = {verdict.target.words: verdict for verdict in verdicts(w4(0.98, 0.5))}
    assert [verdict.judgement for verdict in found.values()] == ["met", "missed"]
    assert found["a different adapter in each row, over the base"].value == 0.5
    measured = verdicts(w1((0, 1.2, 100.0, 1.0), (1, 0.9, 10.0, 0.1), (1, 1.2, 98.0, 0.98), (8, 1.2, 90.0, 0.9)))
    assert [verdict.value for verdict in measured[:2]] == [0.98, 0.9]
    assert measured[2].judgement == "not measured"
    many = verdicts(w1((5, 1.2, 90.0, 0.9), (2000, 1.2, 45.0, 0.45)))
    assert many[2].value == 0.5
    other = Report(name="w4", title="", columns=("a", "over base"), rows=(("identical", nan),))
    assert {verdict.judgement for verdict in verdicts(other)} == {"not measured"}


def told(name: str, columns: tuple[str, ...], *rows: tuple[Cell, ...]) -> list[tuple[float, str]]:
    report = Report(name=name, title="", columns=columns, rows=rows)
    return [(round(one.value, 3), one.judgement) for one in verdicts(report)]


def test_figures_of_every_kind_are_read() -> None:
    assert told("w11", ("term", "within target"), ("pairs", "yes"), ("dense", "no")) == [(0.5, "missed")]
    assert told("w6", ("adapters from", "TTFT p50 over device"), ("host", 1.02), ("disk", 9.0)) == [(1.02, "met")]
    w9 = told("w9", ("phase", "TPOT p99 ms", "failed", "failed acts"), ("quiet", 10.0, 0, 0), ("uploads", 11.0, 1, 2))
    assert w9 == [(1.1, "missed"), (3.0, "missed")]
    w8 = told("w8", ("way", "mixed over it"), ("mixed", 1.0), ("LoRA only", 0.98), ("one task at a time", 1.5))
    assert w8 == [(0.98, "met"), (1.5, "missed")]
    assert told("w13", ("method", "tokens before a difference"), ("lora", 0.2), ("all", 1.0)) == [(1.0, "met")]
    assert told("overhead", ("block", "B over A"), (1, 0.96), (2, 1.0)) == [(0.98, "met")]
    assert told("w5", ("way", "server over it", "answers equal to single"), ("mixed", 2.9, 1.0)) == [
        (2.9, "missed"),
        (2.9, "met"),
        (pytest.approx(nan, nan_ok=True), "not measured"),
    ]


def test_a_report_begins_with_what_became_of_its_targets() -> None:
    first, second, *rest = judged(w4(0.98, 0.5)).notes
    assert first == "one adapter for all rows, over the base = 0.980, target 0.97: met"
    assert second.endswith("= 0.500, target 0.93: missed")
    assert rest == list(w4(0.98, 0.5).notes)
    quick = judged(w4(0.98, 0.5), is_quick=True).notes
    assert quick[0].startswith("one adapter for all rows, over the base = 0.980, target 0.97: not judged: a quick run")
    assert not [note for note in quick[:2] if note.endswith(("met", "missed"))]
    quiet = judged(Report(name="w6", title="", columns=("adapters from", "TTFT p50 over device"), rows=()))
    assert quiet.notes[0].endswith("over resident ones: not measured (target at most 1.03)")


def test_every_target_belongs_to_a_question() -> None:
    assert {target.workload for target in targets()} <= set(QUESTIONS)
    words = [target.words for target in targets()]
    assert len(set(words)) == len(words)


def test_a_page_holds_successes_and_failures_alike(tmp_path: Path) -> None:
    replace(w4(0.5, 0.4), notes=()).file(tmp_path / "old", origin(date="2026-11-20 01:00"))
    w4(0.98, 0.5).file(tmp_path / "new", origin(base="loadtest/0.1b", others=1.5, commit="abc + changes"))
    w1((0, 1.2, 1.0, 1.0)).file(tmp_path / "deep" / "w1", origin("python -m loadtest w1 --base x/demo --quick"))
    whole = page(find_results([tmp_path]))
    reader = Balance()
    reader.feed(whole)
    assert reader.open == []
    text = " ".join(reader.texts)
    for part in ("1 met", "1 missed", "1 older run", "m <1>", "by <hand>", "W4: sixteen <rows>"):
        assert part in text
    assert "doing something else when these began: w4 (1.5 cores)" in text
    assert "prove nothing: w1" in text
    assert "differed from its commit: w4" in text
    assert text.index("W1: many adapters") < text.index("W4: variety")
    assert whole.count("identical over base = 0.980") == 0, "said by the target already"
    assert "more = 0.600" in text
    assert set(re.findall(r'="(http[^"]*)"', whole)) <= NAMESPACES, "nothing is fetched"
    assert "<script" not in whole


def test_results_are_found_or_said_to_be_missing(tmp_path: Path) -> None:
    w4(1.0, 1.0).file(tmp_path / "a", origin())
    assert [one.base for one in find_results([tmp_path, tmp_path / "a"])] == ["0.1b"]
    with pytest.raises(ValueError, match=r"no result\.json"):
        find_results([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="holds no result"):
        load_report(tmp_path)


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    w4(1.0, 1.0).file(tmp_path / "a", origin())
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "sub" / "out.html")]) == 0
    assert (tmp_path / "sub" / "out.html").read_text().startswith("<!doctype html>")
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "run a workload first" in " ".join(capsys.readouterr().out.split())


def test_plots_survive_their_file_and_are_drawn_in_a_page(tmp_path: Path) -> None:
    w4(1.0, 1.0).file(tmp_path, origin())
    assert str(load_report(tmp_path).plot) == str(PLOT)
    drawn = svg(PLOT)
    assert drawn.startswith("<svg")
    for text in ("Tokens &amp; more", "way &lt;x&gt;", ">half<", ">server<"):
        assert text in drawn
    assert drawn == svg(PLOT), "the same plot is the same picture"


@pytest.mark.parametrize("count", [3, LYING + 2])
def test_bars_stand_or_lie_and_bounds_are_marked(count: int, tmp_path: Path) -> None:
    points = tuple((float(at), 1.0 + at) for at in range(count))
    names = tuple(f"term {at}" for at in range(count))
    plot = Plot(title="t", x_label="x", y_label="y", series={"a": points, "b": points}, ticks=names)
    bounded = Plot(
        title="t", x_label="x", y_label="y", series={"a": points}, ticks=names, bounds={"byte bound": points}, level=1.0
    )
    lines = Plot(title="t", x_label="x", y_label="y", series={"a": points}, bounds={"bound": points}, log_x=True)
    for number, one in enumerate((plot, bounded, lines, Plot(**{**_fields(lines), "log_y": True}))):
        draw(one, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5000
    assert "byte bound" in svg(bounded)
    assert "byte bound" not in svg(plot)


def _fields(plot: Plot) -> dict[str, object]:
    return {name: getattr(plot, name) for name in Plot.__slots__}


def test_some_results_hold_more_pictures_than_their_own() -> None:
    rows = (("rho 0.25, cv 1, slora:1", 10.0, 20.0), ("rho 1.5, cv 1, slora:1", 90.0, nan))
    w2 = Report(name="w2", title="", columns=("load", "TTFT p50 ms", "TTFT p99 ms"), rows=rows, plot=PLOT)
    first, second = plots_of(w2)
    assert first.series == {"p50": ((0.25, 10.0), (1.5, 90.0)), "p99": ((0.25, 20.0),)}
    assert second is PLOT
    (speeds,) = plots_of(w4(0.9, 0.8))
    assert speeds.ticks == ("base", "identical", "distinct")
    assert speeds.level == 200.0
    assert plots_of(Report(name="w4", title="", columns=("popularity",), rows=(("base",),), plot=PLOT)) == [PLOT]


@pytest.mark.parametrize("seconds", [None, 30.0])
def test_a_bar_counts_and_says_what_is_left(seconds: float | None) -> None:
    screen = io.StringIO()
    with bar(Console(file=screen, width=100, force_terminal=True), "playing", count=3, seconds=seconds) as tick:
        tick()
        tick()
    said = screen.getvalue()
    assert "playing" in said
    assert ("2/3" in said) is (seconds is None)
    assert "0:00:" in said


def test_steps_run_in_turn_and_failures_are_told(capfd: pytest.CaptureFixture[str]) -> None:
    program = [sys.executable, "-c", "import sys; print('ran', *sys.argv[1:], flush=True); sys.exit('bad' in sys.argv)"]
    chosen = [Step(words=(word, "--x"), about_s=10.0) for word in ("one", "bad", "two")]
    now = iter((0.0, 0.0, 20.0, 120.0))
    failed = run_steps(chosen, ["--base", "b"], Console(width=80), program=program, clock=lambda: next(now))
    said = capfd.readouterr().out
    assert failed == ["bad"]
    assert [line for line in said.splitlines() if line.startswith("ran")] == [
        f"ran {word} --x --base b" for word in ("one", "bad", "two")
    ]
    for part in ("1/3 one: about 30 s left", "2/3 bad: about 40 s left", "3/3 two: about 60 s left"):
        assert part in said


def test_time_left_follows_the_pace_so_far() -> None:
    ahead = [Step(words=("a",), about_s=60.0), Step(words=("b",), about_s=60.0)]
    assert time_left(ahead, spent_s=0.0, planned_s=0.0) == 120.0
    assert time_left(ahead, spent_s=90.0, planned_s=30.0) == 360.0
    assert (minutes(89.0), minutes(150.0)) == ("89 s", "2 min")


def test_the_bench_fits_into_ten_minutes_and_runs_known_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert sum(step.about_s for step in steps()) < 600
    for step in steps():
        with pytest.raises(SystemExit) as ended:
            main([*step.words, "--base", "tiny", "--help"])
        assert ended.value.code == 0, f"no such command: {' '.join(step.words)}"
    assert main(["bench", "--only", "w99"]) == 1
    assert "names no step" in capsys.readouterr().out


def test_the_summary_shows_what_was_measured(tmp_path: Path) -> None:
    w4(0.98, 0.5).file(tmp_path, origin("python -m loadtest w4 --quick", others=1.0))
    screen = io.StringIO()
    show_summary(find_results([tmp_path]), Console(file=screen, width=140))
    assert "no claims: w4" in screen.getvalue()
    assert "prove nothing: w4" in screen.getvalue()
    lines = [line for line in screen.getvalue().splitlines() if "0.1b" in line]
    assert ["met" in line for line in lines] == [True, False]
    assert "missed" in lines[1]


def test_what_others_take_is_measured(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 0 100 0 0 0 0 7 7\n")

    def pass_time(_: float) -> None:
        stat.write_text("cpu  150 0 0 130 20 0 0 0 9 9\n")

    cores = others_cores(sleep=pass_time, page=stat)
    assert cores is not None
    assert cores == pytest.approx(0.5 * (os.cpu_count() or 1), abs=0.01)
    assert others_cores(sleep=lambda _: None, page=stat) is None
    assert others_cores(sleep=lambda _: None, page=tmp_path / "none") is None
    assert origin(others=0.5).is_busy
    assert not origin(others=0.1).is_busy
    assert not origin().is_busy


@pytest.mark.parametrize("width", [80, 60])
def test_a_table_is_read_whole_on_a_narrow_screen(width: int) -> None:
    columns = ("term", "step", "adapters", "base ms", "step ms", "over base", "byte bound", "bound", "within target")
    row: tuple[Cell, ...] = (
        "64 rows of the vocabulary",
        "prefill 4096",
        16,
        123.4567,
        1234.5,
        1.234,
        1.012,
        1.046,
        "no",
    )
    screen = io.StringIO()
    Report(name="w11", title="W11", columns=columns, rows=(row,)).show(Console(file=screen, width=width))
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(line for line in lines[1:] if not line.startswith("──")).split()
    expected = " ".join((*columns, *map(written, row))).split()
    assert set(words) == set(expected)
    if width == 80:
        assert sorted(words) == sorted(expected)


def test_a_table_that_is_too_wide_comes_in_parts_that_name_their_rows() -> None:
    columns = ("replicas, popularity, disks", "placement", *(f"goodput{at}" for at in range(10)))
    rows = (("2, zipf:1, full", "least-loaded", *map(float, range(10))), ("4, drift, empty", "random", *range(10)))
    screen = io.StringIO()
    Report(name="simulate", title="a title", columns=columns, rows=rows).show(Console(file=screen, width=80))
    text = screen.getvalue()
    assert all(f"goodput{at}" in text for at in range(10)), text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert (text.count("placement"), text.count("a title"), text.count("goodput7")) == (2, 1, 1)
    wide = io.StringIO()
    Report(name="simulate", title="a title", columns=columns, rows=rows).show(Console(file=wide, width=140))
    assert wide.getvalue().count("placement") == 1
