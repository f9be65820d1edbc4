"""The command: what it refuses before anything is started."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from peft_serve.cli import app
from peft_serve.cluster.plan import Layout, plain
from peft_serve.cluster.preflight import refusal_of, require_startable
from peft_serve.commands.serving_ray import linger_s
from peft_serve.config import Settings
from peft_serve.engine.adapter_places import open_store
from peft_serve.errors import Unavailable

pytest.importorskip("ray.serve")

RUNNER = CliRunner()


def said(*arguments: str, **environ: str) -> tuple[int, str]:
    result = RUNNER.invoke(app, ["serve-ray", *arguments], env={"COLUMNS": "400", **environ})
    return result.exit_code, " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).split())


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_every_setting_and_every_figure_of_the_layout_is_an_option() -> None:
    code, text = said("--help")
    assert code == 0
    for name in (*Settings.model_fields, *Layout.model_fields, "address"):
        if name != "model":
            assert f"--{name.replace('_', '-')}" in text


def test_the_help_has_its_brackets_and_says_what_is_not_as_with_one_server() -> None:
    code, text = said("--help")
    assert (code, "(needs peft-serve[ray])" in text) == (0, True)
    assert "0 picks a free one" not in text
    assert text.count("for one server: `serve` alone") == 2
    of_one = RUNNER.invoke(app, ["serve", "--help"], env={"COLUMNS": "400"}).output
    assert "0 picks a free one" in of_one


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--replicas", "0"), "--replicas"),
        (("--min-replicas", "2"), "--max-replicas"),
        (("--max-rank", "0"), "--max-rank"),
        (("--placement", "nearest"), "--placement"),
        (("--replica-gpus", "1.5"), "--replica-gpus"),
        (("--fronts", "2"), "--store-shared"),
        (("--api-keys-file", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_a_wrong_option_is_named(options: tuple[str, ...], word: str) -> None:
    code, text = said(*options)
    assert code == 2
    assert word in text


@pytest.mark.parametrize(
    ("options", "word"), [(("--port", "0"), "name one"), (("--cache-trace", "here"), "leave it out with serve-ray")]
)
def test_what_only_one_server_has_is_refused(options: tuple[str, ...], word: str) -> None:
    code, text = said(*options)
    assert code == 2
    assert word in text


def test_a_port_in_use_and_a_cluster_without_a_token_are_found_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, text = said("--port", port)
        assert (code, f"--port {port}" in text) == (1, True)
    code, text = said("--port", port, RAY_AUTH_MODE="disabled")
    assert (code, "RAY_AUTH_MODE=token" in text) == (2, True)


def test_a_base_and_a_store_are_looked_at_before_anything_starts(tmp_path: Path) -> None:
    nowhere, store = tmp_path / "nowhere", tmp_path / "store"
    kind, words = refusal_of(plain(Settings(model=str(nowhere), store=store)), is_alone=True)
    assert (kind, "nowhere: there is no such folder" in words) == ("setting", True)
    assert not store.exists()
    other = open_store(Settings(store=store), store)
    values = plain(Settings(model="demo-llama", store=store))
    with pytest.raises(Unavailable, match="in use by another server"):
        require_startable(values, is_alone=True)
    assert refusal_of(values, is_alone=False) == ("", ""), "the front that comes waits for it"
    other.close()
    assert refusal_of(values, is_alone=True) == ("", "")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file: .*name a folder"):
        require_startable(values | {"store": str(tmp_path / "file")}, is_alone=False)


def test_a_command_that_was_stopped_before_it_asked_is_not_answered() -> None:
    command = [sys.executable, "-m", "peft_serve.cluster.preflight"]
    ran = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", "")


def test_a_device_that_is_not_there_is_found_before_a_cluster_of_our_own_starts(tmp_path: Path) -> None:
    values = plain(Settings(model="demo-llama", store=tmp_path, device="cpu", cuda_graphs="on"))
    kind, words = refusal_of(values, is_alone=True)
    assert (kind, "--cuda-graphs on" in words) == ("setting", True)
    assert refusal_of(values, is_alone=False) == ("", ""), "the machines of another cluster have other devices"


def test_a_hub_that_does_not_answer_is_told_of_while_it_is_asked(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        away = f"http://127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "peft_serve", "serve-ray", "none/such", "--port", free_port()]
        environ = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": away, "HF_HOME": str(tmp_path)}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)
        assert process.stderr is not None
        told = [process.stderr.readline(), process.stderr.readline()]
        is_asking = process.poll() is None
        process.terminate()
        rest = process.communicate(timeout=30)[1]
    assert is_asking
    assert "huggingface_hub" in told[0], told
    assert ("Retrying" in told[0], "Retrying" in told[1]) == (False, True), "each is said once"
    assert "told to stop before it was ready" in rest


def test_only_who_may_have_a_load_balancer_waits_for_it() -> None:
    settings = Settings(drain_delay_s=7.0)
    assert linger_s(settings, signal.SIGTERM) == 7.0
    assert linger_s(settings, signal.SIGINT) == 0.0


def test_requests_are_waited_for_and_a_load_balancer_where_there_may_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_serve.cluster import launch

    now, opened = [0.0], [2, 1, 0]

    class Fronts:
        def broadcast(self, _: str) -> Fronts:
            return self

        def results(self, **_: object) -> list[int]:
            return [opened.pop(0) if len(opened) > 1 else opened[0]]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(launch.serve, "get_deployment_handle", lambda *_: Fronts())
    took = []
    for least_s in (0.0, 0.0, 7.0):
        began_s = now[0]
        launch.drain(Settings(), least_s, clock=lambda: now[0], sleep=sleep)
        took.append(now[0] - began_s)
    assert took == [pytest.approx(0.9), pytest.approx(0.5), pytest.approx(7.5, abs=0.2)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_start_at_once(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """While the settings are tried in a process of their own, and a cluster would be started next."""
    command = [
        sys.executable,
        "-m",
        "peft_serve",
        "serve-ray",
        "--port",
        free_port(),
        "--store",
        str(tmp_path / "store"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not psutil.Process(process.pid).children():
        assert process.poll() is None
        time.sleep(0.02)
    tried = psutil.Process(process.pid).children()
    process.send_signal(number)
    try:
        _, told = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert (process.returncode, "told to stop before it was ready" in told) == (code, True), told
    assert "Traceback" not in told
    psutil.wait_procs(tried, timeout=5)
    assert not any(each.is_running() for each in tried)
