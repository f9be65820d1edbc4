"""A server under test: a peft-serve process that lives as long as a ``with`` block."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

BUSY = (
    *("vllm:num_requests_running", "vllm:num_requests_waiting"),  # ours, and vLLM's
    *("llamacpp:requests_processing", "llamacpp:requests_deferred"),
)
SAMPLE = re.compile(r"^(?P<series>[a-zA-Z_:][\w:]*(?:\{.*\})?)\s+(?P<value>\S+)", re.MULTILINE)


class Command(Protocol):
    """How to start a server of any make, ours or another's."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Set for the process, over what this one has."""
        ...

    @property
    def start_timeout_s(self) -> float:
        """How long it may take until it is ready."""
        ...

    @property
    def ready_path(self) -> str:
        """The page that answers 200 when it is."""
        ...

    def line(self, port: int) -> list[str]:
        """The whole command, for a server that listens on this port of 127.0.0.1."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCommand:
    """How to start our server: `arguments` are appended to ``serve BASE --host --port [--adapters]``."""

    base: Path
    adapters: Path | None = None
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    start_timeout_s: float = 600.0
    ready_path: str = "/readyz"
    program: tuple[str, ...] = (sys.executable, "-m", "peft_serve")

    def line(self, port: int) -> list[str]:
        """The whole command."""
        command = [*self.program, "serve", str(self.base)]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        if self.adapters is not None:
            command += ["--adapters", str(self.adapters)]
        return [*command, *self.arguments]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    """A server that is ready."""

    url: str
    start_s: float
    pid: int
    api_key: str | None = None

    def metrics(self) -> dict[str, float]:
        """Every sample of ``/metrics`` by series (name and labels as printed); none if there is no such page."""
        try:
            return parse_metrics(_get(f"{self.url}/metrics", timeout_s=30.0))
        except urllib.error.HTTPError:
            return {}

    def num_running(self) -> float:
        """Requests that run or wait now."""
        samples = self.metrics()
        return sum(value for series, value in samples.items() if series.split("{")[0] in BUSY)


def parse_metrics(text: str) -> dict[str, float]:
    """Samples of the Prometheus text format by series."""
    return {match["series"]: float(match["value"]) for match in SAMPLE.finditer(text)}


def metrics_delta(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What changed between two scrapes."""
    moved = {series: value - before.get(series, 0.0) for series, value in after.items()}
    return {series: change for series, change in moved.items() if change}


def _get(url: str, *, timeout_s: float) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this machine
    with opener.open(url, timeout=timeout_s) as answer:
        body: bytes = answer.read()
    return body.decode()


def reach(url: str) -> None:
    """Return if somebody speaks HTTP at this address, whatever they say; RuntimeError if not."""
    try:
        _get(f"{url}/readyz", timeout_s=30.0)
    except urllib.error.HTTPError as said:
        said.close()
    except (OSError, http.client.HTTPException, ValueError) as problem:
        raise RuntimeError(
            f"nobody answers at {url} ({problem}): start the server, or leave --url out to have one started"
        ) from None


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running_server(command: Command, log: Path) -> Iterator[RunningServer]:
    """Start the server, wait until its page says that it is ready, and stop it by SIGTERM at the end. What it prints
    goes to the file `log`; RuntimeError with the end of that file if it does not come up."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **command.environment}
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command.line(port), stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        _wait_until_ready(process, f"{url}{command.ready_path}", log, command.start_timeout_s)
        yield RunningServer(url=url, start_s=time.monotonic() - began, pid=process.pid)
    finally:
        _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], page: str, log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            _get(page, timeout_s=5.0)
        except OSError:  # refused, cut off or answered with an error status: not ready yet
            time.sleep(0.2)
        else:
            return
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise RuntimeError(f"the server did not get ready (exit {process.poll()}); it said last:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=60.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def quiet(servers: Sequence[RunningServer], *, timeout_s: float = 60.0) -> None:
    """Wait until none of the servers has anything running; RuntimeError if that takes too long."""
    deadline = time.monotonic() + timeout_s
    while any(server.num_running() for server in servers):
        if time.monotonic() > deadline:
            raise RuntimeError("a server is still busy with requests of an earlier phase")
        time.sleep(0.1)
