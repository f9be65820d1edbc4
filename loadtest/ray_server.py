"""A server of two replicas as a user starts it, in processes of its own, and what is asked of it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

READY_S = 200.0  # on a machine with much else to do
STOP_S = 60.0
_MANY = httpx.Limits(max_connections=200, max_keepalive_connections=0)  # a connection for each, as many callers have


@dataclass(eq=False)
class RayServer:
    """The command and its address."""

    url: str
    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=120, trust_env=False, limits=_MANY))

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(f"{self.url}{path}", json=body, **options)

    def figures(self) -> dict[str, float]:
        """Every sample of /metrics by its name and labels."""
        page = self.client.get(f"{self.url}/metrics").text
        lines = [line.rpartition(" ") for line in page.splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def placed(self) -> dict[str, float]:
        """How many requests were placed in each way, whatever the replica."""
        figures = self.figures()
        kinds = ("base", "first", "same", "moved", "again")
        names = {kind: f'peft_serve_placed_requests_total{{kind="{kind}",replica=' for kind in kinds}
        return {
            kind: sum(value for name, value in figures.items() if name.startswith(start))
            for kind, start in names.items()
        }

    def replicas(self) -> list[psutil.Process]:
        """The processes of the engine's replicas."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [each for each in found if _title(each).startswith("ray::ServeReplica:peft-serve:Engine")]

    def await_replicas(self, number: int, seconds: float = READY_S) -> None:
        """Until so many take requests."""
        until = time.monotonic() + seconds
        while self.figures().get("peft_serve_replicas") != number:
            assert time.monotonic() < until, f"there are no {number} replicas after {seconds:.0f} s"
            time.sleep(0.3)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextmanager
def serving(store: Path, *options: str) -> Iterator[RayServer]:
    """`peft-serve serve-ray demo-llama` until the end, which is Ctrl-C's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scratch = tempfile.mkdtemp(prefix="rs", dir="/tmp")  # sockets have short paths
    command = [
        sys.executable,
        "-m",
        "peft_serve",
        "serve-ray",
        "demo-llama",
        "--port",
        str(port),
        "--store",
        str(store),
    ]
    environ = os.environ | {
        "RAY_TMPDIR": scratch,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen(
        [*command, "--num-threads", "1", "--replica-cpus", "0.5", *options],
        env=environ, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    server = RayServer(url=f"http://127.0.0.1:{port}", process=process)
    is_ready = threading.Event()
    reader = threading.Thread(target=_listen, args=(server, is_ready), daemon=True)
    reader.start()
    try:
        assert is_ready.wait(READY_S), _told(server)
        assert process.poll() is None, _told(server)
        yield server
        process.send_signal(signal.SIGINT)
        process.wait(STOP_S)
    finally:
        _end(process)
        reader.join(10)
        shutil.rmtree(scratch, ignore_errors=True)


def _listen(server: RayServer, is_ready: threading.Event) -> None:
    assert server.process.stderr is not None
    with server.process.stderr as lines:
        for line in lines:
            server.said.append(line.rstrip())
            if line.startswith("ready at"):
                is_ready.set()
    is_ready.set()


def _end(process: subprocess.Popen[str]) -> None:
    """Nothing of it is left, whatever it came to."""
    if process.poll() is not None:
        return
    left = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for each in left:
        if each.is_running():
            each.kill()
    process.wait(10)


def _told(server: RayServer) -> str:
    return "the server does not start:\n" + "\n".join(server.said[-40:])
