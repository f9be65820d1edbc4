"""W13: the oracle, the comparison with it, and the command against the fake server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loadtest.adapters import make_adapters, mixture
from loadtest.cli import main
from loadtest.oracle import Truth, answers
from loadtest.outcome import Outcome
from loadtest.report import load_report
from loadtest.server import RunningServer
from loadtest.stage import Stage
from loadtest.targets import judged
from loadtest.trace import TraceRequest
from loadtest.workloads import w13

pytestmark = pytest.mark.filterwarnings("ignore")  # peft uses names that transformers is about to drop


def request(index: int, *, adapter: str = "", tokens: int = 5) -> TraceRequest:
    return TraceRequest(
        index=index, arrival_s=0.0, adapter=adapter, text=" abe ban dad", prompt_tokens=3, max_new_tokens=tokens
    )


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """Token by token, without a cache."""
    start = len(ids)
    for _ in range(count):
        with torch.inference_mode():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[start:]


@pytest.mark.parametrize("kind", [None, "lora:8", "ia3", "prompt:4"])
def test_the_oracle_is_greedy_decoding_with_one_adapter(kind: str | None, tiny_base: Path, tmp_path: Path) -> None:
    folder = None if kind is None else next(iter(make_adapters(tiny_base, tmp_path, mixture(kind), 1)))
    first, second = answers(tiny_base, folder, [request(0), request(1, tokens=2)])
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder)
    ids = AutoTokenizer.from_pretrained(tiny_base)(" abe ban dad")["input_ids"]
    assert list(first.tokens) == greedy(model.eval(), ids, 5)
    assert second.tokens == first.tokens[:2]
    assert len(first.margins) == 5
    assert min(first.margins) > 0


def test_an_answer_is_compared_up_to_its_first_difference() -> None:
    truth = Truth(tokens=(1, 2, 3, 4), margins=(0.5, 0.4, 0.3, 0.2))

    def beside(*tokens: int) -> w13.Compared:
        return w13.beside(w13.Served(request=request(0), adapter=None, label="base", tokens=tokens), truth)

    same, other, short = beside(1, 2, 3, 4), beside(1, 2, 9, 4), beside(1, 2, 3)
    assert same.is_equal
    assert isnan(same.margin)
    assert (other.num_equal, other.margin, other.is_equal) == (2, 0.3, False)
    assert (short.num_equal, short.margin, short.is_equal) == (3, 0.2, False)


def test_the_report_counts_by_method_and_in_all() -> None:
    found = [
        w13.Compared(label="LORA", num_tokens=10, num_equal=10),
        w13.Compared(label="LORA", num_tokens=10, num_equal=5, margin=0.25),
        w13.Compared(label="IA3", num_tokens=20, num_equal=20),
    ]
    report = w13.report(found, {w13.COUNTED[0]: 7.0}, num_failed=0)
    assert report.rows[0][:5] == ("IA3", 1, 20, 1.0, 1.0)
    assert report.rows[1] == ("LORA", 2, 20, 0.5, 0.75, 0.25)
    assert report.rows[2][:5] == ("all", 3, 40, pytest.approx(2 / 3), 0.875)
    assert judged(report).notes[0] == "tokens equal to peft's, under churn and eviction = 0.875, target 1: missed"
    assert "7 evictions from the device and - loads" in report.notes[1]


def test_answers_that_failed_are_not_compared(mixed_adapters: list[Path]) -> None:
    def outcome(index: int, text: str, error: str | None = None) -> Outcome:
        return Outcome(index=index, adapter="", due_s=0.0, sent_s=0.0, end_s=1.0, text=text, error=error)

    names = [folder.name for folder in mixed_adapters]
    requests = [request(0, adapter=names[0]), request(1), request(2, adapter=names[2])]
    outcomes = [outcome(0, "5 6"), outcome(1, "", error="status 500"), outcome(2, "7")]
    served = list(w13.answered(requests, outcomes, {folder.name: folder for folder in mixed_adapters}))
    assert [(one.label, one.tokens) for one in served] == [("LORA", (5, 6)), ("IA3", (7,))]


def test_the_command_tells_a_server_that_is_wrong(
    fake_server: Any, tiny_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, ...]] = []

    @contextmanager
    def server(
        _: Stage, *, num_adapters: int = 0, name: str = "server", extra: tuple[str, ...] = ()
    ) -> Iterator[RunningServer]:
        started.append(extra)
        yield RunningServer(url=fake_server.url, start_s=0.0, pid=0)

    monkeypatch.setattr(Stage, "server", server)
    places = ["--work", str(tiny_work), "--out", str(tmp_path / "out")]
    load = ["--adapters", "5", "--tokens", "60", "--lengths", "2-4,3-5", "--threads", "1"]
    assert main(["w13", "--quick", *places, *load]) == 0
    (folder,) = (tmp_path / "out").iterdir()
    report = load_report(folder)
    everything = dict(zip(report.columns, report.rows[-1], strict=True))
    assert everything["answers"] == 15 + 2, "the trace, and a tenth as many under the name that moves"
    assert everything["equal answers"] == 0, "the fake server counts"
    assert report.notes[0].endswith("missed")
    assert {row[0] for row in report.rows} >= {"all", "exchanged while running"}
    assert started[0][0] == "--max-resident-adapters=2"


def test_only_float32_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["w13", "--quick", "--dtype", "bfloat16", "--out", str(tmp_path)]) == 1
    assert "float32" in capsys.readouterr().out
