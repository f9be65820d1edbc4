"""Servers for the clients to talk to, each a process of its own, run from the environment that has the server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 150.0


def server_bin() -> Path:
    """The folder with `peft-serve`: SERVER_BIN, else this Python's own."""
    return Path(os.environ.get("SERVER_BIN") or Path(sys.executable).parent).absolute()


@contextmanager
def serving(model: str, folder: Path, *options: str) -> Iterator[str]:
    """The address of a server of `model` on a free port, which keeps its store and its log in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "server.log"
    arguments = [model, "--port", "0", "--store", str(folder / "store"), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (
        log.open("w") as out,
        subprocess.Popen(
            [str(server_bin() / "peft-serve"), "serve", *arguments], stdout=out, stderr=out, env=environment
        ) as process,
    ):
        try:
            yield _address(process, log)
        finally:
            process.terminate()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """What the server says once it is ready."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        if ready := re.search(r"ready at (http://\S+:[1-9]\d*)", log.read_text()):
            return ready[1]
        time.sleep(0.05)
    raise AssertionError(f"the server did not get ready:\n{log.read_text()}")
