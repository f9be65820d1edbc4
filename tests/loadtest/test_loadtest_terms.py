"""W11: every term runs, counts its bytes, and the report says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loadtest.bound import MachineRates, Work
from loadtest.cli import main
from loadtest.kinds import KINDS, NUM_VIRTUAL
from loadtest.report import load_report
from loadtest.steps import StepBench, load_base
from loadtest.terms import TERMS, make_adapter
from loadtest.timed import Timed, time_term
from loadtest.work import Load, bytes_of
from loadtest.workloads import w11

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns about its own names

SHARED = {"rescaled, rank 64", "shared bases, rank 32"}
NEEDS_SUBLAYERS = {"bottleneck of 64", "intervention of rank 4"}
DECODE, PREFILL = Load(num_rows=4, context=8), Load(num_rows=2, num_tokens=8)
RATES = MachineRates(copy_bytes_per_s=1e3, triad_bytes_per_s=1e3, read_bytes_per_s=1e3, flops_per_s=1e6)


@pytest.fixture(scope="module")
def bench(tiny_base: Path) -> StepBench:
    base = load_base(tiny_base, dtype=torch.float32, device="cpu", num_threads=1)
    return StepBench(base, num_positions=64)


@pytest.mark.parametrize("term", sorted(set(TERMS) - NEEDS_SUBLAYERS))
def test_every_term_runs(bench: StepBench, term: str) -> None:
    found = list(time_term(bench, term, {DECODE: 1, PREFILL: 1}, (1, 3), max_bytes=2**31))
    assert [(one.load, one.num_adapters) for one in found] == [(DECODE, 1), (PREFILL, 1), (DECODE, 3)]
    assert all(min(one.step_s, one.base_s) > 0 for one in found)
    own = bytes_of({1: make_adapter(bench.base, TERMS[term], 1)})
    assert found[0].term_work.num_bytes == own
    assert (found[2].term_work.num_bytes == 3 * own) is (term not in SHARED), "shared factors count once"
    if term not in ("own norms", "64 rows of the vocabulary"):
        assert found[0].term_work.num_flops > 0


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(TERMS)))
def test_what_stands_in_front_and_mixtures_run(bench: StepBench, kind: str) -> None:
    load = Load(num_rows=7, context=8)
    points = list(time_term(bench, kind, {load: 1}, (1, 7), max_bytes=2**31))
    assert [point.num_adapters for point in points] == [1, 7]
    shape = bench.base.shape
    front = 2 * 4 * shape.num_layers * shape.num_kv_heads * shape.head_dim * NUM_VIRTUAL  # float32 keys and values
    if kind == "MIX":  # a prompt and a prefix, two LoRAs in three of the slots, scales in one, and the base
        made = [KINDS[kind](bench.base, slot) for slot in range(1, 8)]
        assert made[5] is None
        terms = bytes_of({slot: adapter for slot, adapter in enumerate(made) if adapter is not None})
        assert points[1].term_work.num_bytes == terms + 2 * front
    else:
        assert [point.term_work.num_bytes for point in points] == [front, 7 * front]
    assert points[1].term_work.num_flops > 0


def test_rows_read_what_stands_in_front_of_them(bench: StepBench) -> None:
    load = Load(num_rows=3, context=8)
    adapter = KINDS[f"KV prefix of {NUM_VIRTUAL}"](bench.base, 1)
    assert adapter is not None
    with bench.holding({1: adapter}):
        rows = bench._rows(load, [0, 1, 1])
        copies = tuple(bench._copies(rows))
    assert [row.start for row in rows] == [8, NUM_VIRTUAL + 8, NUM_VIRTUAL + 8]
    assert rows[1].blocks[0] == rows[2].blocks[0], "a full block is shared"
    assert {source for source, _ in copies} == {rows[1].blocks[0] + 1}, "one that is not is copied"
    own = [set(rows[0].blocks), set(rows[1].blocks[1:]), set(rows[2].blocks[1:])]
    assert [target for _, target in copies] == [rows[1].blocks[1], rows[2].blocks[1]]
    assert not own[0] & own[1] and not own[1] & own[2]  # noqa: PT018
    assert bench._rows(load, [0, 1, 1])[1].start == 8, "and nothing stands there behind the block"


@pytest.mark.parametrize("term", sorted(NEEDS_SUBLAYERS))
def test_a_term_without_a_place_on_this_base_is_left_out(bench: StepBench, term: str) -> None:
    assert list(time_term(bench, term, {DECODE: 1}, (1,), max_bytes=2**31)) == []


@pytest.mark.parametrize("term", sorted(NEEDS_SUBLAYERS))
def test_terms_of_sublayers_run_on_a_base_that_has_them(term: str) -> None:
    folder = Path(__file__).parents[2] / "server" / "peft_serve" / "demo" / "demo-llama"
    base = load_base(folder, dtype=torch.float32, device="cpu", num_threads=1)
    (point,) = time_term(StepBench(base, num_positions=64), term, {DECODE: 1}, (2,), max_bytes=2**31)
    assert point.term_work.num_flops > 0


def test_what_takes_too_much_memory_is_left_out(bench: StepBench) -> None:
    size = bytes_of({1: make_adapter(bench.base, TERMS["dense"], 1)})
    points = list(time_term(bench, "dense", {DECODE: 1}, (1, 4), max_bytes=2 * size))
    assert [point.num_adapters for point in points] == [1]


def test_the_report_holds_points_against_their_bounds() -> None:
    points = [
        Timed(
            term="t",
            load=load,
            num_adapters=n,
            step_s=0.03,
            base_s=0.02,
            base_work=Work(num_bytes=1000, num_flops=100),
            term_work=Work(num_bytes=n * 100, num_flops=10),
        )
        for load in (DECODE, PREFILL)
        for n in (1, 4)
    ]
    report = w11.report(points, rates=RATES, base="tiny")
    assert report.rows[1] == ("t", "decode 4", 4, 20.0, 30.0, 1.5, 1.4, pytest.approx(1.4), "yes")
    assert report.rows[2][:2] == ("t", "prefill 16")
    assert [row[-1] for row in report.rows] == ["no", "yes", "no", "yes"]
    assert "1.50 times the base" in report.notes[0]
    assert "2 of 4" in report.notes[1]
    assert report.plot is not None
    assert report.plot.series["measured"] == ((0.0, 1.5),)
    assert report.plot.bounds["bound"] == ((0.0, pytest.approx(1.4)),)


def test_prefills_longer_than_the_context_are_left_out() -> None:
    totals = [load.total_tokens for load in w11.loads(("prefill",), max_context=256, quick=False)]
    assert totals == [64, 256]
    assert [load.total_tokens for load in w11.loads(w11.PHASES, max_context=2048, quick=False)] == [
        *(16, 64, 256, 1024, 4096)
    ]
    assert [w11.times(load, quick=False) for load in w11.loads(w11.PHASES, max_context=2048, quick=False)] == [
        *(40, 32, 8, 2, 1)
    ]
    with pytest.raises(ValueError, match="no phase"):
        w11.loads(("training",), max_context=256, quick=False)


def test_the_command_files_a_report(tiny_work: Path, tmp_path: Path) -> None:
    places = ["--work", str(tiny_work), "--out", str(tmp_path / "out")]
    command = ["w11", "--base", "tiny", "--quick", "--threads", "1", *places]
    assert main([*command, "--term", "pairs", "--term", "own norms", "--phase", "decode"]) == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert [row[0] for row in load_report(folder).rows] == ["pairs"] * 3 + ["own norms"] * 3
    assert "| pairs | decode 16 | 16 |" in (folder / "entry.md").read_text()
    assert main([*command, "--term", "no such"]) == 1
