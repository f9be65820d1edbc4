"""W11: every term runs, counts its bytes, and the report says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loadtest.bases import ensure_base
from loadtest.cli import main
from loadtest.report import load_report
from loadtest.terms import TERMS, StepBench, Timed, bytes_of, load_bench, time_term
from loadtest.workloads import w11

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns about its own names


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> StepBench:
    folder = ensure_base("tiny", tmp_path_factory.mktemp("work"))
    return load_bench(folder, dtype=torch.float32, device="cpu", num_threads=1)


@pytest.mark.parametrize("term", TERMS)
def test_every_term_runs(bench: StepBench, term: str) -> None:
    one, two = time_term(bench, term, (1, 3), repeats=1, max_bytes=2**31)
    assert (one.num_adapters, two.num_adapters) == (1, 3)
    assert min(one.step_s, two.step_s, one.base_s, two.base_s) > 0
    assert one.num_bytes < two.num_bytes
    own = bytes_of({1: bench.adapter(TERMS[term], 1)})
    assert own == one.num_bytes
    assert (two.num_bytes == 3 * own) is (term != "rescaled, rank 64"), "shared factors count once"


def test_what_takes_too_much_memory_is_left_out(bench: StepBench) -> None:
    size = bytes_of({1: bench.adapter(TERMS["dense"], 1)})
    points = list(time_term(bench, "dense", (1, 4), repeats=1, max_bytes=2 * size))
    assert [point.num_adapters for point in points] == [1]


def test_the_report_holds_points_against_the_byte_bound() -> None:
    points = [Timed(term="t", num_adapters=n, step_s=0.03, base_s=0.02, num_bytes=n * 100) for n in (1, 4)]
    report = w11.report(points, base_bytes=1000, base="tiny")
    assert report.rows[1] == ("t", 4, 20.0, 30.0, 1.5, 1.4, pytest.approx(1.5 / 1.4))
    assert "1.50 times the base" in report.notes[0]


def test_the_command_files_a_report(tmp_path: Path) -> None:
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    command = ["terms", "--base", "tiny", "--quick", "--threads", "1", *places]
    assert main([*command, "--term", "pairs", "--term", "own norms"]) == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert [row[0] for row in load_report(folder).rows] == ["pairs"] * 3 + ["own norms"] * 3
    assert "| pairs | 16 |" in (folder / "entry.md").read_text()
    assert main([*command, "--term", "no such"]) == 1
