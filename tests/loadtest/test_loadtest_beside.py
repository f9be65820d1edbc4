"""Beside: cells, what is counted in them, peft's loops kept at hand, and how much memory everybody has taken."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from math import isnan
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loadtest.adapters import adapter_name
from loadtest.cli import main
from loadtest.contestants import Contestant, our_server
from loadtest.lengths import parse_lengths
from loadtest.memory import peak_mib
from loadtest.options import Options
from loadtest.outcome import UNFINISHED, Outcome
from loadtest.peer_loops import decoder
from loadtest.peft_loops import PeftJob, PeftLoop, run_job
from loadtest.peft_worker import outcomes_of, peft_worker, play
from loadtest.report import load_report
from loadtest.server import RunningServer
from loadtest.stage import Stage
from loadtest.trace import BASE, Trace
from loadtest.workloads import beside
from loadtest.workloads.beside import Place, Plan, cell_trace, run, tokens_per_s

pytestmark = pytest.mark.filterwarnings("ignore")  # peft uses names that transformers is about to drop

NAMES = tuple(map(adapter_name, range(4)))


def outcome(index: int, times_s: Sequence[float], *, error: str | None = None, text: str = "x") -> Outcome:
    return Outcome(
        index=index,
        adapter="",
        due_s=0.0,
        sent_s=0.0,
        end_s=times_s[-1] if times_s else 0.0,
        token_times_s=tuple(times_s),
        error=error,
        text=text,
    )


@pytest.fixture
def stage(tmp_path: Path, tiny_work: Path) -> Stage:
    options = Options(base="tiny", work=tiny_work, folder=tmp_path / "run", lengths=parse_lengths("4-4,6-6"))
    return Stage(options, Console(quiet=True))


def test_tokens_are_counted_until_the_last_or_until_the_limit() -> None:
    assert tokens_per_s([outcome(0, (1.0, 2.0)), outcome(1, (1.0, 4.0))], 9.0) == 1.0
    cut = [outcome(0, (1.0, 2.0)), outcome(1, (1.0, 3.0, 11.0), error=UNFINISHED)]
    assert tokens_per_s(cut, 10.0) == 0.4, "what came after the limit does not count, and the limit is the time"
    assert isnan(tokens_per_s([outcome(0, (), error="status 500")], 10.0))


def test_cells_ask_for_what_they_say(stage: Stage) -> None:
    def asked(traffic: str, in_flight: int, seed: int = 1) -> Trace:
        return cell_trace(stage, Place(rank=8, traffic=traffic, in_flight=in_flight), NAMES, seed)

    assert {one.adapter for one in asked("base", 4).requests} == {BASE}
    assert {one.adapter for one in asked("identical", 4).requests} == {NAMES[0]}
    assert [one.adapter for one in asked("distinct", 4).requests] == list(NAMES)
    assert 1 < len({one.adapter for one in asked("zipf", 32).requests}) <= 4
    assert [len(asked("base", number).requests) for number in (1, 4)] == [2, 4]
    assert not {one.text for one in asked("base", 4).requests} & {one.text for one in asked("base", 4, 2).requests}
    places = Plan(ranks=(8, 16), in_flight=(1, 2)).places()
    assert len(places) == 2 * 7
    assert [one.rank for one in places if one.traffic == "base"] == [8, 8]


@dataclass
class Scripted:
    """A contestant that gives a token a second to each request at once, or to one request at a time."""

    name: str
    is_batching: bool = True
    cold: str = "much"
    played: list[Trace] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def play(self, trace: Trace, label: str, *, concurrency: int, limit_s: float) -> list[Outcome]:
        self.played.append(trace)
        self.log.append(label)
        outcomes = []
        for at, request in enumerate(trace.requests):
            start = 0 if self.is_batching else at * request.max_new_tokens
            times = [float(start + number + 1) for number in range(request.max_new_tokens)]
            came = [when for when in times if when <= limit_s]
            error = None if came == times else UNFINISHED
            text = request.text if self.is_batching or at else "other"
            outcomes.append(outcome(request.index, came, error=error, text=text))
        return outcomes

    def peak_mib(self) -> float:
        return 10.0 * len(self.played)


def test_a_table_says_who_is_ahead_and_what_adapters_cost(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    log: list[str] = []
    ours, slow = Scripted("native", log=log), Scripted("slow", is_batching=False, log=log)

    @contextmanager
    def contestants(among: Stage, names: Sequence[str], _: Plan) -> Iterator[list[Contestant]]:
        opened.append(f"{among.options.mixture} {len(names)}")
        yield [ours, slow]

    monkeypatch.setattr(beside, "_contestants", contestants)
    plan = Plan(ranks=(8, 16), traffic=("base", "distinct"), in_flight=(2, 4), limit_s=20.0)
    found = run(stage, plan)
    assert opened == ["lora:8 4", "lora:16 4"]
    assert [row[:4] for row in found.rows[:4]] == [
        *((8, "base", 2, "native"), (8, "base", 2, "slow")),
        *((8, "base", 4, "native"), (8, "base", 4, "slow")),
    ]
    assert [row[:2] for row in found.rows[8:]] == [(16, "distinct")] * 4, "the base does not depend on the rank"
    by_name = [dict(zip(found.columns, row, strict=True)) for row in found.rows]
    first, second, third, fourth = by_name[:4]
    assert (first["tokens/s"], second["tokens/s"]) == (2.0, 1.0)
    assert (second["native over it"], first["native over it"]) == (2.0, 1.0)
    assert (third["tokens/s"], fourth["tokens/s"]) == (4.0, 1.0)
    assert (third["cut off"], fourth["cut off"]) == (0, 2), "of two passes, one request each ran out of time"
    assert (second["equal to native"], first["equal to native"]) == (0.5, 1.0)
    assert (first["TTFT p50 ms"], first["TPOT p50 ms"]) == (1000.0, 1000.0)
    assert by_name[-1]["over own base"] == 1.0
    assert by_name[1]["peak MiB"] == 20.0
    assert log[:4] == [f"{name}, r 8, base x 2" for name in ("native", "slow", "slow", "native")], "there and back"
    assert ours.played[0] == slow.played[0] != ours.played[1]
    assert found.notes[0] == "native is ahead in all 6 comparisons"
    assert "r 16, an adapter that is not loaded, slow: much" in found.notes
    ours.is_batching, slow.is_batching = False, True
    behind = run(stage, replace(plan, there_and_back=False)).notes[0]
    assert "behind in 6 of 6 comparisons: base x 2 at r 8 behind slow (0.50)" in behind


def test_pefts_mixed_loop_plays_only_what_can_be_mixed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def contestants(*_: Any) -> Iterator[list[Contestant]]:
        yield [Scripted("native"), Scripted("peft:single"), Scripted("peft:mixed")]

    monkeypatch.setattr(beside, "_contestants", contestants)
    rows = run(stage, Plan(ranks=(8,), in_flight=(2,), there_and_back=False)).rows
    played = {traffic: [row[3] for row in rows if row[1] == traffic] for traffic in beside.TRAFFIC}
    assert played["base"] == played["identical"] == ["native", "peft:single"]
    assert [row[6] for row in rows if row[3] == "peft:mixed"] == [1.0, 1.0], "over the single loop's base"
    assert played["zipf"] == played["distinct"] == ["native", "peft:single", "peft:mixed"]


def test_what_cannot_be_compared_is_refused(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave --url out"):
        run(Stage(replace(stage.options, url="http://h:1"), Console(quiet=True)), Plan())
    with pytest.raises(ValueError, match="adapters of one rank"):
        run(stage, Plan(others=("openai:x=http://h:1",)))
    with pytest.raises(ValueError, match=r"--llama-server .*nothing is no file"):
        run(stage, Plan(llama=tmp_path / "nothing"))


def test_ours_is_asked_for_each_adapter_before_the_clock(stage: Stage, fake_server: Any) -> None:
    names = NAMES[:2]

    @contextmanager
    def server(*, extra: tuple[str, ...]) -> Iterator[RunningServer]:
        folders.append(Path(extra[1]))
        yield RunningServer(url=fake_server.url, start_s=1.0, pid=0)

    folders: list[Path] = []
    among = stage.among("lora:4")
    among.server = server  # type: ignore[method-assign,assignment]
    with our_server(among, names) as ours:
        asked = [body["adapter"] for body in fake_server.bodies]
        assert asked[:4] == [*names, *names], "the first time and once more"
        assert ours.cold.startswith("first token after ")
        trace = among.trace(adapters=names, popularity="distinct", num_requests=3)
        outcomes = ours.play(trace, "three", concurrency=2, limit_s=30.0)
    assert all(one.ok for one in outcomes)
    assert sorted(path.name for path in folders[0].iterdir()) == list(names)


@pytest.fixture
def job(stage: Stage) -> PeftJob:
    folders = stage.among("lora:4").adapter_folders(2)
    return PeftJob(base=str(stage.base()), adapters=str(folders[0].parent), trace="", mode="mixed")


def test_pefts_loop_stops_at_the_limit_and_says_what_it_said_before(stage: Stage, job: PeftJob, tmp_path: Path) -> None:
    trace = stage.trace(adapters=NAMES[:2], popularity="distinct", num_requests=4)
    path = tmp_path / "trace.json"
    trace.save(path)
    ticks = count(0.0, 1.0)
    loop = PeftLoop(job, list(NAMES[:2]), clock=lambda: next(ticks))
    assert len(loop.load_times_s) == 2
    decode = decoder(stage.base())

    def played(limit_s: float, mode: str = "mixed", batch_size: int = 4) -> list[Outcome]:
        asked = {"mode": mode, "batch_size": batch_size, "limit_s": limit_s}
        said = json.loads(json.dumps(play(loop, trace, asked, lambda: next(ticks))))
        return outcomes_of(trace, said, decode)

    whole = played(1000.0)
    truth = run_job(replace(job, trace=str(path)))
    assert [one.text for one in whole] == [decode(truth.tokens[request.index]) for request in trace.requests]
    assert all(one.ok and len(one.token_times_s) == 6 for one in whole)
    cut = played(3.0)
    assert [one.error for one in cut] == [UNFINISHED] * 4
    assert [len(one.token_times_s) for one in cut] == [2] * 4, "the step that ends at the limit is the last"
    assert all(right.text.startswith(one.text) for one, right in zip(cut, whole, strict=True))
    half = played(7.0, "single", 2)
    assert [one.error for one in half] == [None, UNFINISHED, None, UNFINISHED], "one adapter's batch, then no other"
    assert [len(one.token_times_s) for one in half] == [6, 0, 6, 0]
    assert all(not one.ok for one in played(0.0))


def test_pefts_loops_stay_at_hand_in_a_process(stage: Stage, job: PeftJob, tmp_path: Path) -> None:
    trace = stage.trace(adapters=NAMES[:2], popularity="distinct", num_requests=2)
    path = tmp_path / "trace.json"
    trace.save(path)
    with peft_worker(job, list(NAMES[:2]), tmp_path, label="peft") as worker:
        assert len(worker.load_times_s) == 2
        both = [worker.play(path, mode, batch_size=2, limit_s=60.0) for mode in ("mixed", "single")]
        assert both[0]["tokens"] == both[1]["tokens"]
        assert peak_mib(worker.process.pid) > 50
        worker.process.kill()
        worker.process.wait()
        with pytest.raises(RuntimeError, match="ended before its time"):
            worker.play(path, "mixed", batch_size=2, limit_s=60.0)
    with (
        pytest.raises(RuntimeError, match=r"did not come up:\nno memory"),
        peft_worker(job, [], tmp_path, label="peft", program=(sys.executable, "-c", "raise SystemExit('no memory')")),
    ):
        pass


def test_memory_is_the_peak_of_a_process_and_its_children(tmp_path: Path) -> None:
    for pid, parent, peak in ((7, 1, 2048), (9, 7, 1024), (11, 9, 512), (12, 1, 4096)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "status").write_text(
            f"Name:\tx\nPPid:\t{parent}\nVmPeak:\t99999 kB\nVmHWM:\t {peak} kB\n"
        )
    (tmp_path / "13").mkdir()
    assert peak_mib(7, processes=tmp_path) == 3.5
    assert peak_mib(12, processes=tmp_path) == 4.0
    assert isnan(peak_mib(99, processes=tmp_path))


def test_beside_is_run_from_the_command_line(
    tiny_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plans: list[Plan] = []

    @contextmanager
    def contestants(_: Stage, __: Sequence[str], plan: Plan) -> Iterator[list[Contestant]]:
        plans.append(plan)
        yield [Scripted("native"), Scripted("slow", is_batching=False)]

    monkeypatch.setattr(beside, "_contestants", contestants)
    words = ["beside", "--base", "tiny", "--work", str(tiny_work), "--out", str(tmp_path), "--rank", "8", "--rank", "4"]
    words += ["--in-flight", "2", "--traffic", "distinct", "--traffic", "base", "--loop", "none", "--limit", "40"]
    assert main(words) == 0
    assert (plans[0].ranks, plans[0].traffic, plans[0].loops) == ((8, 4), ("base", "distinct"), ())
    assert (plans[0].in_flight, plans[0].limit_s, plans[0].there_and_back) == ((2,), 40.0, True)
    (folder,) = tmp_path.iterdir()
    read = load_report(folder)
    assert [row[:4] for row in read.rows][::2] == [
        (8, "base", 2, "native"),
        (8, "distinct", 2, "native"),
        (4, "distinct", 2, "native"),
    ]
    assert read.plot is not None
    assert read.plot.ticks == ("base x 2", "distinct x 2")
    assert main([*words, "--llama-server", "nowhere"]) == 1
    assert "nowhere is no file" in " ".join(capsys.readouterr().out.split())
