"""The command `peft-serve`.

Every field of `Settings` is an option of `serve`: the settings are written down once, in config.py.
"""

from __future__ import annotations

import inspect
import logging
import socket
import sys
from collections.abc import Callable
from typing import Any, Optional

import typer
import uvicorn
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.console import Console

import peft_serve
from peft_serve.api.app import create_app
from peft_serve.config import Settings
from peft_serve.engine.assembly import build, shipped_adapters
from peft_serve.engine.loop import Engine
from peft_serve.engine.parts import ServerParts
from peft_serve.engine.watch import BaseWatch
from peft_serve.errors import ServeError
from peft_serve.verify.command import app as adapters_app

_KEEP_ALIVE_S = 75  # longer than clients and proxies keep idle connections, so that they are not cut under a request
_WATCH_S = 300.0  # between two readings of the base's weights, which cost a read of all of them

app = typer.Typer(
    name="peft-serve",
    help="One resident base model, many PEFT adapters in one batch.",
    no_args_is_help=True,
    add_completion=True,
)


app.add_typer(adapters_app, name="adapters")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(peft_serve.__version__)
        raise typer.Exit


@app.callback()
def _options(
    _version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Options of the command itself."""


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(peft_serve.__version__)


def _serve(model: str, **options: Any) -> None:
    """Start the server on a base: demo-llama, demo-t5, a model folder, or a Hugging Face hub id."""
    console = Console(stderr=True)
    given = {name: value for name, value in options.items() if value not in (None, [])}
    try:
        settings = Settings(model=model, **given)
    except ValidationError as error:
        for problem in error.errors():
            name = str(problem["loc"][0]) if problem["loc"] else "settings"
            console.print(f"[red]--{name.replace('_', '-')}: {problem['msg']} (given: {problem.get('input')!r})[/red]")
        raise typer.Exit(2) from None
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
    with console.status("starting") as status:

        def say(line: str) -> None:
            console.print(f"  {line}", highlight=False)
            status.update(line)

        return build(settings, say)


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


def _as_option(name: str, field: FieldInfo) -> inspect.Parameter:
    """The command-line option of a settings field; None when it is not given, so that the environment counts."""
    flag = f"--{name.replace('_', '-')}"
    default = None if field.default is PydanticUndefined else field.default
    text = f"{field.description or ''} [default: {default}; env: PEFT_SERVE_{name.upper()}]".strip()
    annotation: Any = field.annotation
    if "list" not in str(annotation) and "None" not in str(annotation):
        annotation = Optional[annotation]  # noqa: UP045  # made at run time, where `X | None` of a Literal is the same
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=typer.Option(None, flag, help=text), annotation=annotation
    )


def _serve_command() -> Callable[..., None]:
    """`_serve` with one option for each field of `Settings`."""

    def serve(**values: Any) -> None:
        _serve(values.pop("model"), **values)

    serve.__doc__ = _serve.__doc__
    model = inspect.Parameter(
        "model", inspect.Parameter.KEYWORD_ONLY, default=typer.Argument("demo-llama"), annotation=str
    )
    options = [_as_option(name, field) for name, field in Settings.model_fields.items() if name != "model"]
    serve.__signature__ = inspect.Signature([model, *options])  # type: ignore[attr-defined]
    serve.__annotations__ = {p.name: p.annotation for p in (model, *options)}
    return serve


app.command("serve")(_serve_command())


def main() -> None:
    """The entry point of the console script."""
    sys.exit(app())
