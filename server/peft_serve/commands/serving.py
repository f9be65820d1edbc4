"""`peft-serve serve`, once its settings are known: load the base, listen, and stop in order.

Owns the process of a server. It is imported when a server is started and not before: the floors below take seconds.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

import typer
import uvicorn
from rich.console import Console

from peft_serve.api.app import create_app
from peft_serve.commands.base_progress import BaseProgress
from peft_serve.config import Settings
from peft_serve.engine.assembly import build, shipped_adapters
from peft_serve.engine.loop import Engine
from peft_serve.engine.parts import ServerParts
from peft_serve.engine.watch import BaseWatch
from peft_serve.errors import ServeError

_KEEP_ALIVE_S = 75  # longer than clients and proxies keep idle connections, so that they are not cut under a request
_WATCH_S = 300.0  # between two readings of the base's weights, which cost a read of all of them


def serve(settings: Settings, console: Console) -> None:
    """Start the server and serve until told to stop; a start that fails ends the command with 1."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        _check_port(settings)
        parts, engine = _start(settings, console)
    except (ServeError, ValueError, OSError) as error:
        console.print(f"[red]peft-serve does not start:[/red] {error}")
        raise typer.Exit(1) from None
    run_server(parts, engine, console)


def _check_port(settings: Settings) -> None:
    """Find out about a port in use before a base is loaded for it."""
    if settings.port == 0:
        return
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            place = f"--host {settings.host} --port {settings.port}"
            raise ValueError(f"{place}: cannot listen there ({error.strerror}); name another port") from error


def _start(settings: Settings, console: Console) -> tuple[ServerParts, Engine]:
    with BaseProgress(console) as progress:
        return build(settings, progress.say)


def run_server(parts: ServerParts, engine: Engine, console: Console) -> None:
    """Serve until told to stop; running requests get `drain_s` to end."""
    settings = parts.settings
    server = _Server(
        uvicorn.Config(
            create_app(parts),
            host=settings.host,
            port=settings.port,
            log_level="warning",
            timeout_keep_alive=_KEEP_ALIVE_S,
            access_log=False,
            timeout_graceful_shutdown=max(1, round(settings.drain_s)),
            server_header=False,
        ),
        on_listening=lambda port: console.print(_ready_text(parts, port), highlight=False, soft_wrap=True),
        on_stopping=engine.close_admission,
    )
    watch = BaseWatch(parts.check_base, engine.close_admission, parts.metrics, interval_s=_WATCH_S)
    engine.start()
    watch.start()
    try:
        server.run()
    finally:
        watch.stop()
        engine.stop()


class _Server(uvicorn.Server):
    """Says where it listens once it does (the port may have been 0), and when it begins to stop."""

    def __init__(
        self, config: uvicorn.Config, *, on_listening: Callable[[int], None], on_stopping: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._on_listening = on_listening
        self._on_stopping = on_stopping

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets=sockets)
        for bound in (each for server in self.servers for each in server.sockets):
            self._on_listening(int(bound.getsockname()[1]))
            return

    async def shutdown(self, sockets: Any = None) -> None:
        self._on_stopping()
        await super().shutdown(sockets=sockets)


def _ready_text(parts: ServerParts, port: int) -> str:
    host = parts.settings.host if parts.settings.host not in ("0.0.0.0", "::") else "localhost"
    url = f"http://{host}:{port}"
    where, inputs = f"{url}/generate", "The weather today"
    if parts.base.is_encoder:
        where = f"{url}/embed" if parts.base.head is None else f"{url}/classify"
    if shipped_adapters(parts.settings.model) is not None:
        where = f"{url}/generate?adapter=twitter-complaints"
        inputs = "@support my order is three weeks late and nobody answers"
    return (
        f"[green]ready[/green] at {url}  (docs at {url}/docs, metrics at {url}/metrics). Try:\n"
        f"""curl '{where}' -H 'content-type: application/json' -d '{{"inputs": "{inputs}"}}'"""
    )
