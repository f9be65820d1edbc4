"""The check of a GPU: its parts on tiny shapes on the CPU, and what becomes of parts that break, die or hang."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch

from loadtest.cli import main as loadtest_main
from loadtest.gpu import child, command
from loadtest.gpu.ground import Ground
from loadtest.gpu.parts import ALL, Part, chosen, named
from loadtest.gpu.results import (
    Check,
    Figures,
    Found,
    Results,
    Section,
    bounded,
    read_section,
    table,
    told,
    write_section,
)
from loadtest.gpu.supervisor import NO_DEVICE, Job, NoDevice, Supervisor
from loadtest.gpu.timing import in_turns, spread
from tests.kernels.triton import interpreter

pytestmark = pytest.mark.filterwarnings("ignore")  # peft uses names that transformers is about to drop

RIGHT = Found(checks=(bounded("an error", 1e-7, 1e-5),))
WRONG = Found(checks=(Check(name="tokens", passed=False, note="3 of 7"),))


def part(name: str, **more: Any) -> Part:
    return replace(Part(name=name, group="correctness", where="tests:none", weight=5.0), **more)


def ground(*, is_quick: bool = True) -> Ground:
    return Ground(device=torch.device("cpu"), is_quick=is_quick)


def job(folder: Path, until_s: float = 1e12) -> Job:
    return Job(parts=(), device="cpu", is_quick=True, folder=str(folder), until_s=until_s)


# ---- the parts themselves


def test_every_part_runs_on_tiny_shapes(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert interpreter.IS_INTERPRETED
    parts = tuple(one for one in ALL if one.group != "kernels")
    assert child.run(job(tmp_path), ground(), parts=parts) == 0
    sections = {one.name: read_section(tmp_path / f"{one.name.replace(' ', '-')}.json") for one in parts}
    assert {name: (one.state, one.reason) for name, one in sections.items() if one.state != "done"} == dict.fromkeys(
        ("graphs", "memory", "compiled prompts"), ("left out", "it has a meaning on a GPU only")
    )
    assert [check for one in sections.values() for check in one.found.checks if not check.passed] == []
    names = (
        "attention",
        "low-rank",
        "telling",
        "one budget",
        "terms",
        "models",
        "bfloat16",
        "encoders",
        "methods",
        "eight bits",
    )
    for name in names:
        assert sections[name].found.checks, name
    for one in parts:
        if one.group == "bench" and not one.is_for_gpu:
            assert sections[one.name].found.figures, one.name
            for figures in sections[one.name].found.figures:
                assert figures.rows, one.name
                assert all(len(row) == len(figures.columns) for row in figures.rows), one.name


@pytest.mark.parametrize("name", ["attention kernel", "low-rank kernel", "other kernels"])
def test_kernels_stand_beside_plain_torch(name: str) -> None:
    pytest.importorskip("triton")
    (one,) = named([name])
    found = one.function()(ground()).figures
    assert found
    for figures in found:
        assert figures.rows
        assert all(len(row) == len(figures.columns) for row in figures.rows)
        assert all(float(row[figures.columns.index("kernel us")]) > 0 for row in figures.rows)


def test_compiled_prompts_stand_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is run as it is here; that layers share one graph is as it is on a GPU."""
    from loadtest.gpu import compiled_bench

    monkeypatch.setattr(compiled_bench, "BACKEND", "eager")
    (found,) = compiled_bench.prompts(ground()).figures
    (row,) = found.rows
    told = dict(zip(found.columns, row, strict=True))
    assert told["graphs"] == 1, "one for all layers"
    assert 0 <= told["differs by"] < 1e-5
    assert all(told[name] > 0 for name in ("bound ms", "ours ms", "compiled ms", "transformers ms", "compiling s"))


def test_an_error_of_the_device_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose norms are off by a little on the device, and not on the CPU."""
    from loadtest.gpu import model_checks

    honest = model_checks.base_on

    def off(make: Callable[[], Any], device: torch.device, **more: Any) -> Any:
        base = honest(make, device, **more)
        if more.get("kernels") == "auto":
            base.model.model.norm.weight.mul_(1.01)
        return base

    monkeypatch.setattr(model_checks, "base_on", off)
    monkeypatch.setattr(model_checks, "FAMILIES", ("llama",))
    checks = {check.name: check.passed for check in model_checks.models(ground()).checks}
    assert not checks["llama, float32, kernels: log-probabilities"]
    assert checks["llama, float32, plain torch: log-probabilities"]


def test_wrong_terms_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from loadtest.gpu import low_rank_checks

    trial = low_rank_checks._Trial
    run = trial._run
    monkeypatch.setattr(trial, "_run", lambda self, runs, x, y, *more: run(self, runs, x, y, *more) + 1e-3)
    failed = {check.name.rpartition(": ")[2] for check in low_rank_checks.low_rank(ground()).checks if not check.passed}
    assert failed == {"a few rows, odd sizes, float32", "with scale and shift", "the base's tokens keep their bits"}


# ---- a process that runs them


def test_a_part_that_breaks_is_told_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_: Ground) -> Found:
        raise ZeroDivisionError("by nothing")

    functions = {"a": breaks, "b": lambda _: RIGHT, "c": lambda _: RIGHT, "d": lambda _: RIGHT}
    monkeypatch.setattr(Part, "function", lambda self: functions[self.name])
    parts = (part("a"), part("b"), part("c", needs=("no_such_package",)), part("d", is_for_gpu=True))
    assert child.run(job(tmp_path), ground(), parts=parts) == 0
    a, b, c, d = (read_section(tmp_path / f"{name}.json") for name in "abcd")
    assert (a.state, a.reason, a.is_wrong) == ("failed", "ZeroDivisionError: by nothing", True)
    assert (b.state, b.found, b.is_wrong) == ("done", RIGHT, False)
    assert (c.state, c.reason) == ("left out", "no_such_package is not installed")
    assert (d.state, d.is_wrong) == ("left out", False)
    late = job(tmp_path, until_s=100.0)
    assert child.run(late, ground(), parts=(part("b"),), clock=lambda: 99.9) == 0
    assert read_section(tmp_path / "b.json").reason == "no time was left for it"


CHILD = """
import json, sys, time
from pathlib import Path
from loadtest.gpu.results import Check, Found, Section, write_section
job = json.loads(Path(sys.argv[1]).read_text())
for name in job["parts"]:
    path = Path(job["folder"]) / f"{name}.json"
    if name == "no device":
        print("there is none"); sys.exit(2)
    if name == "dies":
        print("Segmentation fault"); sys.exit(139)
    if name == "hangs":
        time.sleep(60)
    if name == "poisoned":
        write_section(Section(name=name, group="correctness", state="failed", reason="a fault"), path)
        sys.exit(3)
    found = Found(checks=(Check(name="tokens", passed=name != "wrong"),))
    write_section(Section(name=name, group="correctness", state="done", found=found), path)
"""


@pytest.fixture
def program(tmp_path: Path) -> tuple[str, ...]:
    """Stands in for the process that runs parts: what it does is in their names."""
    path = tmp_path / "program.py"
    path.write_text(CHILD)
    return (sys.executable, str(path))


def supervisor(folder: Path, program: tuple[str, ...], **more: Any) -> Supervisor:
    settings: dict[str, Any] = {"device": "cpu", "is_quick": True, "until_s": 1e12, "say": lambda _: None}
    return Supervisor(folder / "parts", program=program, **{**settings, **more})


def test_a_process_that_dies_or_is_poisoned_costs_its_part_only(tmp_path: Path, program: tuple[str, ...]) -> None:
    said: list[str] = []
    parts = [part(name) for name in ("one", "dies", "two", "poisoned", "three")]
    sections = supervisor(tmp_path, program, say=said.append).run(parts)
    assert [one.name for one in sections] == [one.name for one in parts]
    assert [one.state for one in sections] == ["done", "failed", "done", "failed", "done"]
    assert sections[1].reason == "its process ended with status 139: Segmentation fault"
    assert sections[3].reason == "a fault"
    assert len(said) == len(parts)
    assert [path.name for path in sorted((tmp_path / "parts").iterdir())] == ["child.log", "job.json"]


def test_a_part_that_hangs_is_ended_and_the_next_one_runs(tmp_path: Path, program: tuple[str, ...]) -> None:
    parts = [part(name) for name in ("one", "hangs", "two")]
    fast = fast_clock()
    sections = supervisor(tmp_path, program, grace_s=1.0, until_s=fast() + 60.0, clock=fast).run(parts)
    assert [one.state for one in sections] == ["done", "failed", "done"]
    assert sections[1].reason.startswith("it was ended after")


def fast_clock() -> Callable[[], float]:
    """Twenty seconds a second."""
    began_s = time.monotonic()
    return lambda: 20 * (time.monotonic() - began_s)


def test_when_time_is_over_no_process_is_begun(tmp_path: Path, program: tuple[str, ...]) -> None:
    fast = fast_clock()
    parts = [part(name) for name in ("one", "hangs", "dies", "two")]
    sections = supervisor(tmp_path, program, grace_s=1.0, until_s=1.0, clock=fast).run(parts)
    assert [one.state for one in sections] == ["done", "failed", "left out", "left out"]
    assert sections[-1].reason == "no time was left for it"
    assert not sections[-1].is_wrong


def test_no_part_runs_on_when_all_is_to_be_over(tmp_path: Path, program: tuple[str, ...]) -> None:
    """The last part has all the time that the others left, and no half as much again."""
    fast = fast_clock()
    sections = supervisor(tmp_path, program, grace_s=1.0, until_s=fast() + 40.0, clock=fast).run(
        [part("one"), part("hangs")]
    )
    assert sections[1].reason.startswith("it was ended after")
    assert fast() < 40.0 + 1.0 + 10.0


def test_what_there_is_is_filed_behind_each_part(tmp_path: Path, program: tuple[str, ...]) -> None:
    filed: list[tuple[str, ...]] = []
    parts = [part(name) for name in ("one", "dies", "two")]
    asked = supervisor(tmp_path, program, file=lambda sections: filed.append(tuple(one.state for one in sections)))
    sections = asked.run(parts)
    assert filed == [("done", "left out", "left out"), ("done", "failed", "left out"), ("done", "failed", "done")]
    assert [one.state for one in sections] == ["done", "failed", "done"]


def test_where_the_device_is_not_there_nothing_is_run(tmp_path: Path, program: tuple[str, ...]) -> None:
    with pytest.raises(NoDevice, match="there is none"):
        supervisor(tmp_path, program).run([part("no device"), part("one")])


# ---- the command


def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: tuple[str, ...], *names: str) -> tuple[int, str]:
    said: list[str] = []
    monkeypatch.setattr(command, "chosen", lambda _: tuple(part(name) for name in names))
    arguments = ["--device", "cpu", "--quick", "--out", str(tmp_path / "out"), "--commit", "abc"]
    parsed = command.parser().parse_args(arguments)
    return command.run(parsed, arguments, say=said.append, program=program), "\n".join(said)


def test_the_command_files_what_it_found_and_fails_where_something_is_wrong(
    tmp_path: Path, program: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(tmp_path, monkeypatch, program, "one", "two")[0] == 0
    status, said = check(tmp_path, monkeypatch, program, "one", "wrong")
    assert status == 1
    assert "FAIL tokens" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "table.md", "child.log"}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["commit"], results["device"], results["is_quick"]) == ("abc", "cpu", True)
    assert [one["name"] for one in results["sections"]] == ["one", "wrong"]
    assert "| tokens | FAILED | - | - |  |" in (tmp_path / "out" / "table.md").read_text()


def test_results_are_there_while_later_parts_run(
    tmp_path: Path, program: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever ends the command early has what was found before."""
    seen: list[list[str]] = []

    def ended(_: Path, *, keeps_log: bool) -> None:  # as what it stands in for
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        seen.append([one["state"] for one in results["sections"]])
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_tidy", ended)
    with pytest.raises(KeyboardInterrupt):
        check(tmp_path, monkeypatch, program, "one", "wrong")
    assert seen == [["done", "done"]]
    assert "| tokens | FAILED |" in (tmp_path / "out" / "table.md").read_text()


def test_without_a_gpu_it_says_so_in_one_line(
    tmp_path: Path, program: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(tmp_path, monkeypatch, program, "no device") == (NO_DEVICE, "gpu-check: there is none")
    assert not (tmp_path / "out").exists()
    assert loadtest_main(["gpu-check", "--device", "cpu"]) == NO_DEVICE


def test_only_some_parts_can_be_run() -> None:
    assert [one.name for one in chosen(None)] == [one.name for one in ALL]
    for group in ("correctness", "kernels", "bench"):
        assert {one.group for one in chosen(group)} == {"facts", group}
    assert [one.name for one in named(["peft", "machine"])] == ["machine", "peft"]
    for one in ALL:
        assert callable(one.function()), one.name


# ---- what it writes


def test_a_section_is_read_back_as_it_was(tmp_path: Path) -> None:
    figures = Figures(title="t", columns=("a", "b"), rows=((1, None), ("x", 0.5)), notes=("n",))
    found = Found(facts=(("GPU", "none"),), checks=WRONG.checks, figures=(figures,), left_out=("much",))
    section = Section(name="s", group="bench", state="done", seconds=1.5, found=found)
    write_section(section, tmp_path / "s.json")
    assert read_section(tmp_path / "s.json") == section
    assert "not checked: much" in told(section)
    whole = Results(date="d", commit="c", command="k", device="cpu", is_quick=True, seconds=2.0, sections=(section,))
    assert whole.is_wrong
    assert "| x | 0.5 |" in table(whole)
    assert "- s: not checked: much" in table(whole)


def test_an_error_that_is_no_number_is_too_large() -> None:
    assert not bounded("e", nan, 1.0).passed
    assert not bounded("e", 1.1, 1.0).passed
    assert bounded("e", 1.0, 1.0).passed


def test_a_benchmark_that_broke_is_no_wrong_answer() -> None:
    broke = Section(name="b", group="bench", state="failed", reason="out of memory")
    assert not broke.is_wrong
    assert replace(broke, group="correctness").is_wrong


def test_times_are_taken_in_turns() -> None:
    order: list[str] = []
    taken = in_turns(ground(), {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, most_s=0.0)
    assert order == ["a", "b", "a", "b", "b", "a"]  # warmed up, then there and back
    assert {name: one.count for name, one in taken.items()} == {"a": 2, "b": 2}
    assert (spread([3.0, 1.0, 2.0]).median_s, spread([3.0, 1.0, 2.0]).low_s) == (2.0, 1.5)
