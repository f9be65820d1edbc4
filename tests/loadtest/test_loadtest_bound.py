"""The bound: what a step must do, how rates are measured, and the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch

from loadtest.bound import LARGEST_BYTES, MATRIX_SIZES, MachineRates, Work, joined, measure_rates
from loadtest.cli import main
from loadtest.report import load_report
from loadtest.steps import StepBench, load_base
from loadtest.work import Load, adapters_work, base_work, flops_of
from loadtest.workloads import bound
from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.primitives import (
    Adapter,
    Affine,
    BlockDiagonal,
    Dense,
    Edit,
    GatedPrompt,
    Kronecker,
    LowRank,
    Replace,
    Sparse,
)
from peft_serve.core import AdapterId
from peft_serve.model.base import ResidentBase

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns about its own names

RATES = MachineRates(copy_bytes_per_s=50.0, triad_bytes_per_s=100.0, read_bytes_per_s=80.0, flops_per_s=10.0)


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> ResidentBase:
    return load_base(tiny_base, dtype=torch.float32, device="cpu", num_threads=1)


def test_the_bound_is_the_slower_of_reading_and_arithmetic() -> None:
    assert Work(num_bytes=200, num_flops=10).bound_s(RATES) == 2.0
    assert Work(num_bytes=200, num_flops=40).bound_s(RATES) == 4.0
    assert (Work(num_bytes=1, num_flops=2) + Work(num_bytes=3, num_flops=4)) == Work(num_bytes=4, num_flops=6)


def test_rates_count_arrays_as_stream_does() -> None:
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            self.now += 0.5
            return self.now

    found = measure_rates(device="cpu", dtype=torch.float32, num_bytes=8192, quick=True, clock=Clock())
    assert found.copy_bytes_per_s == 2 * 8192 / 0.5
    assert found.triad_bytes_per_s == 3 * 8192 / 0.5
    assert found.read_bytes_per_s == 8192 / 0.5
    assert found.flops_per_s == 2 * max(MATRIX_SIZES) ** 3 / 0.5
    assert found.bytes_per_s == found.triad_bytes_per_s
    assert LARGEST_BYTES >= 2**28, "larger than caches"


def test_a_decode_step_reads_every_weight_and_the_context_once(base: ResidentBase) -> None:
    layer = 128 * 128 + 2 * 64 * 128 + 128 * 128 + 3 * 256 * 128  # q, k and v, o, feed-forward
    weights, head, row_kv = 2 * layer, 1024 * 128, 2 * 2 * 64  # two layers, one key/value head of 64
    work = base_work(base, Load(num_rows=3, context=10))
    assert work.num_bytes == 4 * (weights + head + row_kv * 3 * 10)
    attention = 4 * 2 * 128 * 3 * 11  # 4 flops, layers, heads by size, rows, positions
    assert work.num_flops == 2 * (weights + head) * 3 + attention


def test_a_prefill_runs_the_head_on_last_tokens_only(base: ResidentBase) -> None:
    load = Load(num_rows=2, num_tokens=8)
    assert (load.total_tokens, load.attended) == (16, 36)
    one, two = (base_work(base, Load(num_rows=2, num_tokens=n)) for n in (8, 9))
    assert one.num_bytes == two.num_bytes, "weights are read once, however many tokens"
    per_token = (two.num_flops - one.num_flops) / 2 - 4 * 2 * 128 * 9
    assert per_token == base_work(base, Load(num_rows=1)).num_flops - 2 * 1024 * 128 - 4 * 2 * 128


SITE = SiteSpec(path="x", kind=SiteKind.LINEAR, out_features=6, in_features=4, parameters={})


@pytest.mark.parametrize(
    ("edit", "flops"),
    [
        (Affine(delta=LowRank(torch.ones(3, 4), torch.ones(6, 3))), 2 * 3 * (4 + 6)),
        (Affine(in_scale=torch.ones(4), shift=torch.ones(6)), 10),
        (Affine(out_mix=BlockDiagonal(torch.ones(3, 2, 2))), 24),
        (Affine(maps=(Dense(torch.ones(6, 4)),)), 48),
        (Affine(maps=(Kronecker(torch.ones(2, 2), torch.ones(3, 2)),)), 2 * (2 * 2 * 2 + 2 * 2 * 3)),
        (Affine(maps=(Sparse(torch.zeros(5).long(), torch.zeros(5).long(), torch.ones(5)),)), 10),
        (GatedPrompt(torch.ones(2, 7, 2), torch.ones(2, 7, 2), torch.ones(1), is_projected=True), 4 * 7 * 4),
        (Replace({"weight": torch.ones(6, 4)}), 0),
    ],
)
def test_flops_of_a_token(edit: Edit, flops: int) -> None:
    assert flops_of(edit, SITE) == flops


def test_adapters_are_read_once_each_and_share_the_tokens(base: ResidentBase) -> None:
    path = "model.layers.0.mlp.up_proj"
    edit = Affine(delta=LowRank(torch.ones(8, 128), torch.ones(256, 8)))
    edits = {slot: Affine(delta=LowRank(edit.delta.a_RI.clone(), edit.delta.b_OR.clone())) for slot in (1, 2)}
    adapters = {slot: Adapter(id=AdapterId(str(slot)), method="T", sites={path: edits[slot]}) for slot in (1, 2)}
    load = Load(num_rows=4, context=5)
    both, one = (adapters_work(base, held, load) for held in (adapters, {1: adapters[1]}))
    assert both.num_bytes == 2 * one.num_bytes == 2 * 4 * 8 * (128 + 256)
    assert both.num_flops == one.num_flops == 4 * 2 * 8 * (128 + 256)
    assert adapters_work(base, {}, load) == Work(num_bytes=0, num_flops=0)


def test_rows_of_any_length_are_stepped(base: ResidentBase) -> None:
    bench = StepBench(base, num_positions=64, max_rows=4)
    for load in (Load(num_rows=4, context=15), Load(num_rows=4, context=16), Load(num_rows=1, num_tokens=64)):
        assert bench.step_s(load, repeats=1) > 0
    with pytest.raises(AssertionError, match="more positions"):
        bench.step_s(Load(num_rows=4, num_tokens=48), repeats=1)


def test_rates_are_taken_in_turns_with_steps(base: ResidentBase) -> None:
    seen = list[str]()
    bench = StepBench(base, num_positions=64, max_rows=4, clock=lambda: float(len(seen)))
    inner, bench._once_s = bench._once_s, lambda rows: (seen.append("step"), inner(rows))[1]  # type: ignore[method-assign]
    step_s, given = bench.between(Load(num_rows=1, context=3), lambda: seen.append("rate") or len(seen), repeats=2)
    assert seen[-8:] == ["rate", "step", "step", "rate"] * 2
    assert len(given) == 4
    assert step_s == 0
    assert joined([RATES, replace(RATES, flops_per_s=30.0)], max).flops_per_s == 30.0
    assert joined([RATES, replace(RATES, flops_per_s=30.0)], median).flops_per_s == 20.0


def test_the_report_puts_steps_beside_their_bounds() -> None:
    points = [
        bound.Point(num_rows=n, work=Work(num_bytes=100.0, num_flops=5.0 * n), step_s=2.0, rates=RATES) for n in (1, 8)
    ]
    report = bound.report(points, base="b")
    assert [row[8] for row in report.rows] == [2.0, 0.5]
    assert [row[9] for row in report.rows] == [0.5, 4.0]
    assert report.plot is not None
    assert report.plot.bounds["bound"] == ((1.0, 1000.0), (8.0, 4000.0))


def test_the_command_files_a_report(tiny_work: Path, tmp_path: Path) -> None:
    places = ["--work", str(tiny_work), "--out", str(tmp_path)]
    assert main(["bound", "--base", "tiny", "--quick", "--threads", "1", *places]) == 0
    (folder,) = tmp_path.iterdir()
    report = load_report(folder)
    assert [row[0] for row in report.rows] == [1, 4, 16]
    assert all(float(row[7]) > 0 for row in report.rows)
