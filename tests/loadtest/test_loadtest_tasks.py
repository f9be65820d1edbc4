"""W6 to W9 and policies: what they ask for, what they compute from it, and whole commands against the fake server."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loadtest.churn import Act, Churn
from loadtest.cli import main
from loadtest.lengths import parse_lengths
from loadtest.measure import summarise
from loadtest.options import Options
from loadtest.outcome import Outcome
from loadtest.report import load_report
from loadtest.server import RunningServer
from loadtest.stage import Calibration, Stage
from loadtest.targets import judged, verdicts
from loadtest.trace import BASE, Trace, TraceRequest
from loadtest.workloads import policies, w6, w7, w8, w9

pytestmark = pytest.mark.filterwarnings("ignore")  # peft uses names that transformers is about to drop

CALIBRATION = Calibration(capacity_rps=2.0, ttft_s=0.1, tpot_s=0.01)


def outcome(index: int, *, adapter: str = "", ttft_s: float = 0.1, tpot_s: float = 0.01, ok: bool = True) -> Outcome:
    times = (index + ttft_s, index + ttft_s + tpot_s)
    return Outcome(
        index=index,
        adapter=adapter,
        due_s=float(index),
        sent_s=float(index),
        end_s=times[-1],
        token_times_s=times,
        error=None if ok else "status 500",
    )


def request(index: int, adapter: str) -> TraceRequest:
    return TraceRequest(
        index=index, arrival_s=float(index), adapter=adapter, text=" abe", prompt_tokens=1, max_new_tokens=2
    )


# ---- W6


def test_w6_sets_every_tier_beside_the_device() -> None:
    times = {"device": 0.1, "host": 0.102, "disk": 0.15, "never seen": 0.3}
    found = {kind: [summarise([outcome(n, ttft_s=time) for n in range(4)])] for kind, time in times.items()}
    report = w6.report(found, CALIBRATION, 4)
    over = {row[0]: row[5] for row in report.rows}
    assert over == {kind: pytest.approx(time / 0.1) for kind, time in times.items()}
    assert judged(report).notes[0].endswith("= 1.020, target at most 1.03: met")
    assert "never seen 3.000" in report.notes[0]


# ---- W7


def test_w7_reads_hits_from_what_the_server_counted() -> None:
    outcomes = [outcome(n, adapter=name) for n, name in enumerate("aabbb")]
    moved = {w7.LOADS: 2.0, w7.LOADED_BYTES: 40.0, w7.LOAD_S: 0.5}
    found = w7.point(outcomes, moved, {"a": 10, "b": 30}, policy="lru", share=0.5)
    assert (found.hit_rate, found.byte_hit_rate) == (pytest.approx(0.6), pytest.approx(1 - 40 / 110))
    silent = w7.point(outcomes, {w7.LOADS: 2.0}, {"a": 10, "b": 30}, policy="lru", share=0.5)
    assert silent.byte_hit_rate != silent.byte_hit_rate, "not counted is not measured"
    assert w7.point(outcomes, {}, {"a": 10, "b": 30}, policy="lru", share=0.5).byte_hit_rate == 1.0


def test_w7_has_belady_beside_each_size() -> None:
    trace = Trace(requests=tuple(request(n, name) for n, name in enumerate("abcabcabc")))
    sizes = dict.fromkeys("abc", 10)
    simulated = {0.67: w7.offline(trace, sizes, 0.67)}
    points = [
        w7.point([outcome(n) for n in range(9)], {w7.LOADS: 9.0}, {"": 10}, policy=policy, share=0.67)
        for policy in w7.POLICIES
    ]
    report = w7.report(points, simulated, 3)
    rates = {row[1]: row[4] for row in report.rows}
    assert rates["lru"] == 0, "a cycle longer than the cache"
    assert rates["belady"] == pytest.approx(3 / 9)


def test_w7_counts_tensors_without_the_header(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {}}).encode()
    (tmp_path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(120))
    assert w7.size_of(tmp_path) == 120


# ---- policies


def test_policies_get_the_same_traffic_and_a_heavy_tenant_is_beside_the_same_light_ones(tmp_path: Path) -> None:
    stage = Stage(Options(lengths=parse_lengths("cpu"), folder=tmp_path), Console(quiet=True))
    made = {phase: policies.trace_of(stage, phase, 10.0, 8, 20.0) for phase in policies.WITH_ALL_SLOTS}
    made[policies.CRAMPED] = policies.trace_of(stage, policies.CRAMPED, 10.0, 8, 20.0)
    assert len({tuple(one.requests) for one in made.values()}) == len(made)
    alone, beside = made[policies.ALONE].requests, made[policies.BESIDE].requests
    light = [one for one in beside if one.adapter != policies.HEAVY]
    assert [replace(one, index=0) for one in light] == [replace(one, index=0) for one in alone]
    assert len(beside) > 5 * len(alone)
    assert [one.index for one in beside] == list(range(len(beside)))
    assert all(early.arrival_s <= late.arrival_s for early, late in pairwise(beside))
    assert policies.HEAVY not in made[policies.ALONE].adapters


def test_policies_say_what_the_heavy_tenant_costs_the_light_ones() -> None:
    moved = {policies.ADAPTERS: 30.0, policies.STEPS: 10.0}

    def one(light_s: float) -> policies.Played:
        slow = [outcome(n, adapter=policies.HEAVY, ttft_s=9.0) for n in range(30)]
        return policies.played([*slow, *(outcome(n, adapter="light", ttft_s=light_s) for n in range(20))], moved)

    phases = (*policies.WITH_ALL_SLOTS, policies.CRAMPED)
    found = {(phase, policy): [one(0.1)] for phase in phases for policy in policies.POLICIES}
    found[policies.BESIDE, "fcfs"] = [one(0.6), one(1.0)]
    report = policies.report(found, CALIBRATION, 8)
    rows = {row[0]: row for row in report.rows}
    assert len(rows) == len(phases) * len(policies.POLICIES)
    assert rows[f"{policies.BESIDE}: fcfs"][4:7] == (3.0, pytest.approx(800.0), pytest.approx(8.0))
    assert rows[f"{policies.BESIDE}: fair"][6] == pytest.approx(1.0)
    assert rows[f"{policies.STEADY}: fcfs"][6] == "-"
    assert "8.00 times" in report.notes[0]


# ---- W8


def test_w8_has_as_many_lora_tasks_as_mixed_ones() -> None:
    for groups in (1, 2, 4):
        mixed, lora = w8.mixed_tasks(groups), w8.lora_tasks(groups)
        assert len(mixed) == len(set(lora)) == 6 * groups
        assert mixed.count(BASE) == groups
        assert all(int(name[1:]) % 5 < 2 for name in lora)
        assert max(int(name[1:]) for name in (*lora, *filter(None, mixed))) < 15 * groups


def test_w8_serves_the_requests_at_hand_task_by_task() -> None:
    requests = [request(number, name) for number, name in enumerate("ababbbba")]
    groups = [[one.index for one in group.requests] for group in w8.by_task(requests, 4)]
    assert groups == [[0, 2], [1, 3], [4, 5, 6], [7]]


def test_w8_counts_tokens_of_whole_answers() -> None:
    found = w8.figures([outcome(0), outcome(1), outcome(2, ok=False)], 2.0)
    assert (found.tokens_per_s, found.num_failed) == (2.0, 1)
    speeds = {"mixed": 10.0, "one task at a time": 4.0, "LoRA only": 12.5}
    report = w8.report({(8, way): [w8.Pass(tokens_per_s=s, num_failed=0)] for way, s in speeds.items()}, 6)
    assert [row[3] for row in report.rows] == [1.0, 2.5, 0.8]
    assert [verdict.judgement for verdict in verdicts(report)] == ["missed", "met"]


# ---- W9


def test_w9_holds_warm_traffic_against_itself_without_uploads() -> None:
    quiet = w9.Pass(summary=summarise([outcome(n, tpot_s=0.010) for n in range(5)]), churn=Churn())
    acts = [Act(what="upload", status=201, seconds=0.2), Act(what="delete", status=500, seconds=0.1)]
    busy = w9.Pass(summary=summarise([outcome(n, tpot_s=0.011) for n in range(5)]), churn=Churn(acts=acts))
    report = w9.report({"quiet": [quiet], "uploads": [busy]}, CALIBRATION)
    assert report.rows[1][5:8] == (0, 1, pytest.approx(200.0))
    assert report.rows[1][-1] == pytest.approx(1.1)
    assert [(round(one.value, 3), one.judgement) for one in verdicts(report)] == [(1.1, "missed"), (1.0, "missed")]


# ---- whole commands


@pytest.fixture
def started(fake_server: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[str, ...]]]:
    """Every server a workload starts is the fake one; how many adapters and which options it was to have."""
    asked: list[tuple[int, tuple[str, ...]]] = []

    @contextmanager
    def server(
        _: Stage, *, num_adapters: int = 0, name: str = "server", extra: tuple[str, ...] = ()
    ) -> Iterator[RunningServer]:
        asked.append((num_adapters, extra))
        yield RunningServer(url=fake_server.url, start_s=0.0, pid=0)

    monkeypatch.setattr(Stage, "server", server)
    fake_server.token_delay_s = 0.003
    return asked


def run(command: str, work: Path, out: Path, *more: str) -> Path:
    common = ["--base", "tiny", "--work", str(work), "--out", str(out), "--quick", "--duration", "0.2"]
    assert main([command, *common, "--concurrency", "4", "--lengths", "2-4,3-5", *more]) == 0
    (folder,) = out.iterdir()
    return folder


def test_w6_asks_for_what_it_has_brought_about(
    started: list[Any], fake_server: Any, tiny_work: Path, tmp_path: Path
) -> None:
    report = load_report(run("w6", tiny_work, tmp_path / "out", "--adapters", "4"))
    assert [row[0] for row in report.rows] == list(w6.KINDS)
    assert all(row[-1] == 0 for row in report.rows)
    ((num_adapters, options),) = started
    assert num_adapters == 4
    assert options[0] == "--max-resident-adapters=3"
    assert fake_server.acts == [f"POST /adapters/a0000{n}/unload" for n in range(4)] * 2
    asked = [body["adapter"] for body in fake_server.bodies]
    assert sorted(name for name in asked if name.startswith("new")) == [f"new{n:05d}" for n in range(8)]


def test_w7_starts_a_server_for_each_policy(started: list[Any], tiny_work: Path, tmp_path: Path) -> None:
    report = load_report(run("w7", tiny_work, tmp_path / "out", "--adapters", "4"))
    assert [row[1] for row in report.rows] == ["lru", "cost", "belady"]
    assert [options[2] for _, options in started] == ["--eviction-policy=lru", "--eviction-policy=cost"]
    assert all(options[0] == "--max-resident-adapters=1" for _, options in started)


def test_w8_plays_the_same_backlog_three_ways(
    started: list[Any], fake_server: Any, tiny_work: Path, tmp_path: Path
) -> None:
    folder = run("w8", tiny_work, tmp_path / "out")
    assert [row[:2] for row in load_report(folder).rows] == [(8, way) for way in w8.WAYS]
    lines = {path.name[:3]: len(path.read_text().splitlines()) for path in folder.glob("*at-hand*.jsonl")}
    assert list(lines.values()) == [16] * 6
    assert started[0][0] == 15


def test_w9_plays_with_and_without_uploads(
    started: list[Any], fake_server: Any, tiny_work: Path, tmp_path: Path
) -> None:
    report = load_report(run("w9", tiny_work, tmp_path / "out", "--adapters", "2"))
    by_phase = {row[0]: row for row in report.rows}
    assert by_phase["quiet"][6] == 0
    assert by_phase["uploads"][6] >= 2
    assert "failures beside uploads = 0.000, target at most 0: met" in report.notes
    assert any(name.startswith("churn-") for name in fake_server.uploads)


@pytest.mark.parametrize("command", ["w6", "w7"])
def test_workloads_that_size_caches_start_their_own_server(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--url", "http://127.0.0.1:9", "--out", str(tmp_path), "--quick"]) == 1
    assert "leave --url out" in capsys.readouterr().out


def test_w8_takes_the_mixture_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["w8", "--mixture", "S1", "--out", str(tmp_path), "--quick"]) == 1
    assert "leave --mixture S1 out" in capsys.readouterr().out
