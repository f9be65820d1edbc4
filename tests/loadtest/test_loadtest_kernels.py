"""The table of products: every weight of the base, and the way that was measured against its bound."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.bound import MachineRates
from loadtest.cli import main
from loadtest.report import load_report
from loadtest.workloads.kernels import Point, report

RATES = MachineRates(copy_bytes_per_s=1e9, triad_bytes_per_s=1e9, read_bytes_per_s=4e9, flops_per_s=8e9)


def test_a_product_stands_beside_reading_its_weight_or_multiplying() -> None:
    few = Point(num_out=1000, num_in=1000, num_rows=1, seconds={"ours": 2e-3, "torch": 4e-3})
    many = Point(num_out=1000, num_in=1000, num_rows=16, seconds={"torch": 8e-3})
    table = report([few, many], RATES, 4, title="t")
    assert table.rows[0] == ("1000 x 1000", 1, pytest.approx(2e3), "", pytest.approx(4e3), pytest.approx(1e3), 2.0)
    assert table.rows[1][5:] == (pytest.approx(4e3), pytest.approx(2.0))  # without ours, the best of the others


def test_the_command_measures_every_weight_of_the_base(tiny_work: Path, tmp_path: Path) -> None:
    places = ["--work", str(tiny_work), "--out", str(tmp_path)]
    assert main(["kernels", "--base", "tiny", "--quick", "--threads", "1", *places]) == 0
    (folder,) = tmp_path.iterdir()
    table = load_report(folder)
    assert len(table.rows) > 4
    assert {row[1] for row in table.rows} == {1, 4, 16, 32}
    assert all(float(row[4]) > 0 and float(row[6]) > 0 for row in table.rows)
