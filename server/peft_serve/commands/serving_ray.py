"""`peft-serve serve-ray`, once its settings are known: a cluster, both deployments, and an end in order.

Owns the command's process, in which nothing is served. It loads neither torch nor a base: the replicas do.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from peft_serve.api.keyring import open_keyring
from peft_serve.cluster.plan import Layout, absolute, plain
from peft_serve.cluster.preflight import require_startable
from peft_serve.commands.exits import CommandFailed, Exit, exit_of
from peft_serve.commands.layout import FOR_ONE_SERVER
from peft_serve.commands.listening import check_port, warn_of_openness
from peft_serve.config import Settings
from peft_serve.errors import ServeError
from peft_serve.logs import configure_logs

_BY_SIGNAL = 128  # added to a signal's number, as shells tell of a process that ended by it
_NUMBERS = (signal.SIGINT, signal.SIGTERM)


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
    """Start and serve until told to stop; a start that is refused ends the command (`exit_of`), and one that a signal
    interrupts as that signal ends a process."""
    configure_logs(settings.log_level, settings.log_format)
    try:
        with _Signals() as signals:
            _serve_ray(settings, layout, address, console, signals)
    except (ServeError, ValueError, OSError, RuntimeError) as error:
        console.print(f"[red]peft-serve does not start:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(exit_of(error)) from None
    except (KeyboardInterrupt, SystemExit):
        if signals.is_ready:
            raise
        console.print("told to stop before it was ready: what was started ends", highlight=False)
        raise typer.Exit(_BY_SIGNAL + (signals.number or signal.SIGTERM)) from None  # while ray starts, SIGTERM is its


def _serve_ray(settings: Settings, layout: Layout, address: str | None, console: Console, signals: _Signals) -> None:
    _check(settings)
    layout.require_possible(settings)
    try:
        from peft_serve.cluster.launch import cluster, deploy, drain, require_authentication
    except ImportError:
        raise ValueError("serve-ray needs Ray Serve; pip install 'peft-serve[ray]'") from None
    require_authentication(address, os.environ)
    settings = absolute(settings)
    require_startable(plain(settings), is_alone=address is None)
    warn_of_openness(settings, open_keyring(settings))
    with cluster(settings, layout, address):
        signals.take()  # ray has taken SIGTERM for itself
        deploy(settings, layout, lambda line: console.print(line, highlight=False, soft_wrap=True))
        signals.wait_from_now_on()
        console.print(_ready_text(settings), highlight=False, soft_wrap=True)
        signals.stopped.wait()
        console.print("stopping: running requests get their time", highlight=False)
        drain(settings, linger_s(settings, signals.number), clock=time.monotonic, sleep=time.sleep)


def linger_s(settings: Settings, number: int | None) -> float:
    """How long a server that stops still says so: whoever presses Ctrl-C has no load balancer to wait for."""
    return 0.0 if number == signal.SIGINT else settings.drain_delay_s


class _Signals:
    """SIGINT and SIGTERM: the first one interrupts a start, with KeyboardInterrupt, and has a server that is ready stop
    in order; the second one interrupts that."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.number: int | None = None  # of the last one
        self.is_ready = False

    def __enter__(self) -> _Signals:
        self.take()
        return self

    def __exit__(self, *raised: object) -> None:
        for number in _NUMBERS if self.is_ready else ():
            signal.signal(number, signal.default_int_handler)

    def take(self) -> None:
        for number in _NUMBERS:
            signal.signal(number, self._told)

    def wait_from_now_on(self) -> None:
        self.is_ready = True

    def _told(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        if self.is_ready:
            signal.signal(number, signal.default_int_handler)
            self.stopped.set()
            return
        for each in _NUMBERS:
            signal.signal(each, signal.SIG_IGN)  # the end takes a moment
        raise KeyboardInterrupt


def _check(settings: Settings) -> None:
    """What can be wrong is found before anything is started."""
    for name in FOR_ONE_SERVER:
        if getattr(settings, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: is for one server (`serve`); leave it out with serve-ray")
    if settings.port == 0:
        raise ValueError("--port 0: Ray Serve listens on a port that is told; name one")
    check_port(settings)
    open_keyring(settings)


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
