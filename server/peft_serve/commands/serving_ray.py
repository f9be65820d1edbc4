"""`peft-serve serve-ray`, once its settings are known: a cluster, both deployments, and an end in order.

Owns the command's process, in which nothing is served. It loads neither torch nor a base: the replicas do.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from typing import Final

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from peft_serve.api.keyring import open_keyring
from peft_serve.cluster.plan import Layout, absolute
from peft_serve.commands.exits import CommandFailed, Exit
from peft_serve.commands.listening import check_port, warn_of_openness
from peft_serve.config import Settings
from peft_serve.errors import ServeError
from peft_serve.logs import configure_logs

_NOT_YET = ("otlp_traces_endpoint", "cache_trace")


def layout_of(**given: object) -> Layout:
    """The layout of the options that were given; a wrong one is a usage error that names it."""
    try:
        return Layout(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        option = f"--{str(first['loc'][0]).replace('_', '-')}: " if first["loc"] else ""
        message = f"{option}{first['msg'].removeprefix('Value error, ')}"
        raise CommandFailed(Exit.USAGE, message, code="settings") from None


def serve_ray(settings: Settings, layout: Layout, address: str | None, console: Console) -> None:
    """Start and serve until told to stop; a start that fails ends the command with 1."""
    configure_logs(settings.log_level, settings.log_format)
    try:
        _check(settings)
        layout.require_possible(settings)
        try:
            from peft_serve.cluster.launch import cluster, deploy, drain
        except ImportError:
            raise ValueError("serve-ray needs Ray Serve; pip install 'peft-serve[ray]'") from None
        settings = absolute(settings)
        _require_base(settings)
        warn_of_openness(settings, open_keyring(settings))
        with cluster(settings, layout, address), _told_to_stop() as stopped:
            deploy(settings, layout, lambda line: console.print(line, highlight=False, soft_wrap=True))
            console.print(_ready_text(settings), highlight=False, soft_wrap=True)
            stopped.wait()
            console.print("stopping: running requests get their time", highlight=False)
            drain(settings, clock=time.monotonic, sleep=time.sleep)
    except (ServeError, ValueError, OSError, RuntimeError) as error:
        console.print(f"[red]peft-serve does not start:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(Exit.FAILED) from None


class _told_to_stop:  # noqa: N801  reads as a word
    """An event that SIGINT and SIGTERM set; a second one interrupts."""

    def __enter__(self) -> threading.Event:
        event = threading.Event()

        def stop(number: int, _frame: object) -> None:
            signal.signal(number, signal.default_int_handler)
            event.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        return event

    def __exit__(self, *raised: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)


def _check(settings: Settings) -> None:
    """What can be wrong is found before anything is started."""
    for name in _NOT_YET:
        if getattr(settings, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: is for one server (`serve`); leave it out with serve-ray")
    if settings.port == 0:
        raise ValueError("--port 0: Ray Serve listens on a port that is told; name one")
    check_port(settings)
    open_keyring(settings)


_FIND_BASE: Final = """
import sys
from peft_serve.model.loader import NotServable, require_configuration
try:
    require_configuration(sys.argv[1], revision=sys.argv[2] or None)
except NotServable as error:
    sys.exit(str(error))
"""


def _require_base(settings: Settings) -> None:
    """Find out about a base that is not there before a cluster is started for it, in a process that ends with that."""
    told = [sys.executable, "-c", _FIND_BASE, settings.model, settings.revision or ""]
    found = subprocess.run(told, stderr=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        raise ValueError(found.stderr.strip().splitlines()[-1] if found.stderr.strip() else "the base cannot be read")


def _ready_text(settings: Settings) -> str:
    host = settings.host if settings.host not in ("0.0.0.0", "::") else "localhost"
    url = f"http://{host}:{settings.port}"
    where, inputs = f"{url}/", "The weather today"
    if settings.model == "demo-llama":
        where = f"{url}/generate?adapter=twitter-complaints"
        inputs = "@support my order is three weeks late and nobody answers"
    has_keys = settings.api_key is not None or settings.api_keys_file is not None
    key = " -H 'authorization: Bearer YOUR_KEY'" if has_keys else ""
    return (
        f"[green]ready[/green] at {url}  (docs at {url}/docs, metrics at {url}/metrics). Try:\n"
        f"""curl '{where}'{key} -H 'content-type: application/json' -d '{{"inputs": "{inputs}"}}'"""
    )
