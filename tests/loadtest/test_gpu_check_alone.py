"""The check of a GPU on a machine with little else: every part runs without the packages that serve HTTP, and without
those that run tests, whose models and drivers it uses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
HIDDEN = (
    "fastapi",
    "hypothesis",
    "llguidance",
    "multipart",
    "prometheus_client",
    "pydantic",
    "pydantic_settings",
    "pytest",
    "python_multipart",
    "ray",
    "starlette",
    "typer",
    "uvicorn",
)
PROGRAM = f"""
import sys
from importlib.machinery import PathFinder

found = PathFinder.find_spec
hidden = {HIDDEN!r}
PathFinder.find_spec = staticmethod(
    lambda name, path=None, target=None: None if name.partition(".")[0] in hidden else found(name, path, target)
)
try:
    import pydantic
except ModuleNotFoundError:
    pass
else:
    sys.exit("the packages are there")
import re
from pathlib import Path
from loadtest.gpu.parts import ALL
from loadtest.gpu.tiny import module

for part in ALL:
    part.function()
texts = [path.read_text() for path in Path("loadtest/gpu").glob("*.py")]
of_tests = {{name for text in texts for name in re.findall('(?<!_)module[(]"(.+?)"[)]', text)}}
for name in of_tests:
    module(name)
print(f"all parts are there, and {{len(of_tests)}} modules of the tests")
"""


def test_no_part_needs_what_serves_http_or_runs_tests() -> None:
    places = os.pathsep.join([str(ROOT / "server"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": places, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=240,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"all parts are there, and [1-9]\d* modules of the tests", done.stdout)


def test_who_ends_the_command_ends_what_has_the_gpu(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "loadtest", "gpu-check", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    command = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (job := running(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert job, "the parts have a process of their own"
    command.send_signal(signal.SIGTERM)
    assert command.wait(30) == 128 + signal.SIGTERM
    assert not running(tmp_path)


def running(folder: Path) -> list[str]:
    """Processes that run this folder's parts."""
    told = str(folder / "parts" / "job.json").encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if told in path.read_bytes():
                found.append(path.parent.name)
    return found
