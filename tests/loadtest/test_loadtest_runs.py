"""Servers as processes, uploads, and whole commands against the fake server."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loadtest.cli import main
from loadtest.peft_loops import run_job
from loadtest.report import load_report
from loadtest.server import RunningServer, ServerCommand, quiet, running_server
from loadtest.stage import Stage
from loadtest.upload import upload_adapters
from loadtest.workloads import w5

PROGRAM = """
import http.server, json, os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: (print("stopping", flush=True), os._exit(0)))
arguments = sys.argv[1:]
if "--fail" in arguments:
    sys.exit("no such base")
asked = []
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked.append(self.path)
        self.send_response(503 if len(asked) < 3 else 200)
        self.end_headers()
        self.wfile.write(f"arguments {len(arguments)}".encode())
print(json.dumps(arguments), flush=True)
http.server.HTTPServer(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), Answer).serve_forever()
"""


def fake_command(*arguments: str) -> ServerCommand:
    return ServerCommand(
        base=Path("some-base"),
        adapters=Path("some-adapters"),
        arguments=arguments,
        program=(sys.executable, "-c", PROGRAM),
        start_timeout_s=30.0,
    )


def test_a_server_is_started_waited_for_and_stopped(tmp_path: Path) -> None:
    with running_server(fake_command("--max-rows", "8"), tmp_path / "server.log") as server:
        assert server.metrics() == {"arguments": 10.0}
        assert server.num_running() == 0
        quiet([server])
        os.kill(server.pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)
    said = (tmp_path / "server.log").read_text().splitlines()
    given = json.loads(said[0])
    assert given[:2] == ["serve", "some-base"]
    assert given[2:5] == ["--host", "127.0.0.1", "--port"]
    assert given[6:] == ["--adapters", "some-adapters", "--max-rows", "8"]
    assert said[-1] == "stopping"


def test_a_server_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="no such base"),
        running_server(fake_command("--fail"), tmp_path / "server.log"),
    ):
        pass


def test_a_busy_server_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = iter([{"vllm:num_requests_running": 1.0}, {'vllm:num_requests_waiting{m="x"}': 1.0}, {"other": 4.0}])
    monkeypatch.setattr(RunningServer, "metrics", lambda _: next(pages, {"vllm:num_requests_running": 1.0}))
    server = RunningServer(url="", start_s=0.0, pid=0)
    quiet([server])
    with pytest.raises(RuntimeError, match="busy"):
        quiet([server], timeout_s=0.05)


def test_uploads_arrive_under_their_names(fake_server: Any, mixed_adapters: list[Path]) -> None:
    done: list[int] = []
    asyncio.run(upload_adapters(fake_server.url, mixed_adapters[:2], on_done=lambda: done.append(1)))
    asyncio.run(upload_adapters(fake_server.url, mixed_adapters[:1]))
    assert sorted(fake_server.uploads) == ["a00000", "a00001"]
    assert len(done) == 2


def test_a_refused_upload_is_said(fake_server: Any, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    with pytest.raises(RuntimeError, match="bad was refused with 422"):
        asyncio.run(upload_adapters(fake_server.url, [tmp_path / "bad"]))


def run(command: str, fake: Any, work: Path, out: Path, *more: str) -> Path:
    """A quick run of a workload against the fake server; answers with the folder of its results."""
    fake.token_delay_s = 0.01
    common = ["--url", fake.url, "--base", "tiny", "--work", str(work), "--out", str(out), "--quick"]
    load = ["--adapters", "2", "--duration", "0.2", "--concurrency", "4", "--lengths", "2-4,3-5"]
    assert main([command, *more, *common, *load]) == 0
    (folder,) = out.iterdir()
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", ["w1", "w2", "w3", "w4"])
def test_workloads_run_and_file_their_results(
    command: str, fake_server: Any, tiny_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(command, fake_server, tiny_work, tmp_path / "out")
    report = load_report(folder)
    assert report.rows
    assert all(row[-1] == 0 for row in report.rows), "nothing failed"
    assert {path.name for path in folder.iterdir()} >= {"result.json", "entry.md", "plot.png"}
    assert list(folder.glob("*.jsonl"))
    assert sorted(fake_server.uploads) == ["a00000", "a00001"]
    assert "verdict" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_w5_sets_the_server_beside_pefts_loops(
    fake_server: Any, tiny_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(w5, "run_in_subprocess", lambda job, _, on_done: run_job(job, on_done=lambda _: on_done()))
    monkeypatch.setattr(w5, "palindrome", list)
    folder = run("w5", fake_server, tiny_work, tmp_path / "out", "--requests", "6")
    equal = {row[0]: row[3] for row in load_report(folder).rows}
    assert equal == {"server": 0, "single": 1, "mixed": 1, "sorted": 1}  # the fake server says other things
    again = load_report(run("replay", fake_server, tiny_work, tmp_path / "replay", str(folder / "trace.json")))
    assert dict(again.rows)["num_ok"] == 6


def test_overhead_loads_two_servers_in_turn(
    fake_server: Any, tiny_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[int, tuple[str, ...]]] = []

    @contextmanager
    def server(
        _: Stage, *, num_adapters: int = 0, name: str = "server", extra: tuple[str, ...] = ()
    ) -> Iterator[RunningServer]:
        started.append((num_adapters, extra))
        yield RunningServer(url=fake_server.url, start_s=0.0, pid=0)

    monkeypatch.setattr(Stage, "server", server)
    fake_server.token_delay_s = 0.01
    common = ["--base", "tiny", "--work", str(tiny_work), "--out", str(tmp_path / "out"), "--duration", "0.3"]
    load = ["--adapters", "2", "--concurrency", "4", "--lengths", "2-4,3-5", "--b-arg=--max-rows=8", "--repeats", "2"]
    assert main(["overhead", "--quick", *common, *load]) == 0
    assert started == [(0, ()), (2, ("--max-rows=8",))]
    (folder,) = (tmp_path / "out").iterdir()
    report = load_report(folder)
    assert [row[0] for row in report.rows] == [1, 2]
    assert all(0.5 < float(row[1]) < 2 for row in report.rows)
    assert len(list(folder.glob("*block*.jsonl"))) == 8


def test_a_trace_is_made_and_replayed(
    fake_server: Any, tiny_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "trace.json")
    make = ["trace", path, "--rate", "40", "--duration", "0.4", "--adapters", "2", "--lengths", "1-3,2-2"]
    assert main([*make, "--popularity", "zipf:1", "--seed", "3"]) == 0
    folder = run("replay", fake_server, tiny_work, tmp_path / "out", path)
    figures = dict(load_report(folder).rows)
    assert figures["num_ok"] == figures["num_requests"]
    assert figures["prompt_tokens by the server"] > 0
    assert main(["report", str(folder)]) == 0
    assert "errors: none" in capsys.readouterr().out


def test_a_mistake_is_a_sentence_and_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["overhead", "--url", "http://127.0.0.1:9", "--out", str(tmp_path), "--quick"]) == 1
    assert main(["w5", "--mixture", "ia3", "--out", str(tmp_path), "--quick"]) == 1
    assert main(["make-base", "--shape", "9b", "--work", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "leave --url out" in said
    assert "LoRA only" in said
    assert "9b" in said
