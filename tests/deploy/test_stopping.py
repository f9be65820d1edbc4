"""How the process ends: a probe sees it coming, what runs is finished, and a dead engine is no clean end."""

from __future__ import annotations

import io
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import typer
from rich.console import Console

from peft_serve.commands import serving
from peft_serve.commands.listener import Listener
from peft_serve.config import Settings
from peft_serve.core import FinishEvent, FinishReason
from peft_serve.engine.loop import Engine
from peft_serve.engine.snapshot import EngineState
from peft_serve.errors import Unavailable
from tests.api.api_fakes import FakeEngine, World, make_world

DELAY_S = 2.0


class StoppableEngine(FakeEngine):
    """The fake engine with the way down that the command needs."""

    def close_admission(self) -> None:
        if self.state is EngineState.RUNNING:
            self.state = EngineState.DRAINING

    def give_up(self, reason: str) -> None:
        self.state = EngineState.DEAD

    def cut_short(self) -> None:
        self.close_admission()
        with self._news:
            error = Unavailable("the server stopped before the request was complete", retry_after_s=1.0)
            failed = [FinishEvent(request=each, reason=FinishReason.FAILED, error=error) for each in self._live]
            self._live.clear()
            self._ends += failed
            self._news.notify()


class Process:
    """`run_server` on a thread, as the command would run it; `listener` once it listens."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = world
        self.listeners: list[Listener] = []
        process = self

        class Noted(Listener):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                process.listeners.append(self)

        monkeypatch.setattr(serving, "Listener", Noted)
        self.ended: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 10
        while not (self.listeners and self.listeners[0].started):
            assert time.monotonic() < deadline, "it listens"
            time.sleep(0.005)
        port = self.listeners[0].servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(timeout=10, headers={"connection": "close"})  # each asks anew, as probes do

    def _run(self) -> None:
        try:
            serving.run_server(self.world.parts, cast(Engine, self.world.engine), Console(file=io.StringIO()))
            self.ended.set_result(0)
        except typer.Exit as end:
            self.ended.set_result(end.exit_code)

    def tell(self, sig: signal.Signals) -> None:
        self.listeners[0].handle_exit(sig, None)

    def status(self, path: str) -> int:
        return self.client.get(self.url + path).status_code


@pytest.fixture
def process(tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    world = make_world(tiny_tokenizer, tmp_path)
    engine = StoppableEngine(world.parts.codec)
    settings = Settings(port=0, drain_delay_s=DELAY_S, drain_s=5)
    made = Process(
        replace(world, engine=engine, parts=replace(world.parts, engine=engine, settings=settings)), monkeypatch
    )
    yield made
    made.tell(signal.SIGINT)
    made.ended.result(10)
    made.client.close()


def test_a_probe_sees_the_end_before_connections_are_refused(process: Process) -> None:
    assert process.status("/readyz") == 200
    began_s = time.monotonic()
    process.tell(signal.SIGTERM)
    statuses = []
    while time.monotonic() - began_s < 20:
        try:
            statuses.append((process.status("/readyz"), process.status("/livez")))
        except httpx.TransportError:
            break
        time.sleep(0.05)
    assert time.monotonic() - began_s >= DELAY_S, "it listens as long as it was told to"
    assert (503, 200) in statuses
    assert (200, 200) not in statuses[statuses.index((503, 200)) :]
    assert process.ended.result(10) == 0


def test_a_new_request_meanwhile_is_told_to_come_back_and_a_running_one_ends(process: Process) -> None:
    process.world.engine.step_s = 0.05
    running: Future[httpx.Response] = Future()
    body = {"inputs": "x", "parameters": {"max_new_tokens": 40, "ignore_eos": True}}

    def ask() -> None:
        running.set_result(httpx.post(f"{process.url}/generate", json=body, timeout=20))

    threading.Thread(target=ask, daemon=True).start()
    while process.world.engine.num_live == 0:
        time.sleep(0.005)
    process.tell(signal.SIGTERM)
    while process.status("/readyz") == 200:
        time.sleep(0.02)
    refused = httpx.post(f"{process.url}/generate", json=body, timeout=5)
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    answer = running.result(20)
    assert answer.status_code == 200
    assert answer.headers["x-generated-tokens"] == "40"
    assert process.ended.result(10) == 0


def test_what_outlives_the_time_to_drain_is_told_so(process: Process, caplog: pytest.LogCaptureFixture) -> None:
    process.world.engine.step_s = 0.05
    process.listeners[0]._drain_s = 0.5
    body = {"inputs": "x", "parameters": {"max_new_tokens": 400, "ignore_eos": True}}
    with httpx.stream("POST", f"{process.url}/generate_stream", json=body, timeout=20) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data:"))
        assert "token" in json.loads(next(lines)[5:])
        process.tell(signal.SIGINT)
        last = json.loads(list(lines)[-1][5:])
    assert "stopped before the request was complete" in json.dumps(last)
    assert process.ended.result(10) == 0
    assert "--drain-s 5 is over: " in caplog.text


def test_ctrl_c_does_not_wait_for_load_balancers(process: Process) -> None:
    began_s = time.monotonic()
    process.tell(signal.SIGINT)
    assert process.ended.result(10) == 0
    assert time.monotonic() - began_s < DELAY_S


def test_a_second_signal_ends_the_waiting(process: Process) -> None:
    began_s = time.monotonic()
    process.tell(signal.SIGTERM)
    time.sleep(0.2)
    process.tell(signal.SIGINT)
    assert process.ended.result(10) == 0
    assert time.monotonic() - began_s < DELAY_S


def test_a_dead_engine_ends_the_process_with_a_code(process: Process) -> None:
    process.world.engine.state = EngineState.DEAD
    assert process.ended.result(10) == 1


def test_a_base_that_changed_ends_the_process_with_a_code(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_WATCH_S", 0.01)
    world = make_world(tiny_tokenizer, tmp_path)
    engine, is_sound = StoppableEngine(world.parts.codec), threading.Event()
    is_sound.set()
    parts = replace(world.parts, engine=engine, settings=Settings(port=0, drain_s=5), check_base=is_sound.is_set)
    made = Process(replace(world, engine=engine, parts=parts), monkeypatch)
    assert made.status("/readyz") == 200
    is_sound.clear()
    assert made.ended.result(10) == 1
    made.client.close()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_not_raised_again_when_the_server_has_stopped(sig: signal.Signals) -> None:
    """Or the process dies of it before the engine has written what is to be kept."""
    import uvicorn

    listener = Listener(
        uvicorn.Config(lambda: None),
        on_listening=lambda _: None,
        on_stopping=lambda: None,
        on_overdue=lambda: None,
        is_dead=lambda: False,
        delay_s=0,
        drain_s=0,
    )
    earlier = signal.getsignal(sig)
    with listener.capture_signals():
        signal.raise_signal(sig)
        assert listener.should_exit
    assert signal.getsignal(sig) == earlier


@pytest.mark.parametrize("time_of_signal_s", [0.0, 0.15])
def test_streams_that_run_are_given_to_their_end(process: Process, time_of_signal_s: float) -> None:
    process.world.engine.step_s = 0.01
    body = {"inputs": "x", "stream": True, "parameters": {"max_new_tokens": 40, "ignore_eos": True}}
    found: list[tuple[int, bytes]] = []

    def ask() -> None:
        answer = httpx.post(f"{process.url}/generate", json=body, timeout=30)
        found.append((answer.status_code, answer.content))

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(32)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while len(process.world.engine.seen) < 32:
        assert time.monotonic() < deadline, "all run"
        time.sleep(0.005)
    time.sleep(time_of_signal_s)
    process.tell(signal.SIGTERM)
    for thread in threads:
        thread.join(30)
    assert [status for status, _ in found] == [200] * 32
    assert {content.count(b"data:") for _, content in found} == {40}
    lasts = [json.loads(content.rstrip().rsplit(b"data:", 1)[1]) for _, content in found]
    assert all(last["generated_text"] for last in lasts)
    assert process.ended.result(10) == 0
