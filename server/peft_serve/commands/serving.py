"""`peft-serve serve`, once its settings are known: load the base, listen, and stop in order.

Owns the process of a server. It is imported when a server is started and not before: the floors below take seconds.
"""

from __future__ import annotations

import logging
import uuid

import typer
import uvicorn
from rich.console import Console
from rich.markup import escape

from peft_serve.api.app import create_app
from peft_serve.api.exchanges import Tracer
from peft_serve.api.keyring import Keyring, open_keyring
from peft_serve.commands.allocator import giving_back
from peft_serve.commands.base_progress import BaseProgress
from peft_serve.commands.connections import ConnectionLimits, Connections, room_for
from peft_serve.commands.exits import Exit, exit_of
from peft_serve.commands.interpreter import settle_interpreter
from peft_serve.commands.listener import Listener
from peft_serve.commands.listening import check_port, warn_of_openness
from peft_serve.config import Settings
from peft_serve.engine.adapter_places import shipped_adapters
from peft_serve.engine.assembly import build
from peft_serve.engine.loop import Engine
from peft_serve.engine.parts import ServerParts
from peft_serve.engine.snapshot import EngineState
from peft_serve.engine.watch import BaseWatch
from peft_serve.errors import ServeError
from peft_serve.logs import configure_logs

_log = logging.getLogger(__name__)

_LAST_WORDS_S = 5  # for answers to leave the process once the requests were ended
_KEEP_ALIVE_S = 75  # longer than clients and proxies keep idle connections, so that they are not cut under a request
_CHANGED = "the base's weights have changed"
_WATCH_S = 300.0  # between two readings of the base's weights, which cost a read of all of them


def serve(settings: Settings, console: Console) -> None:
    """Start the server and serve until told to stop; a start that is refused ends the command (`exit_of`)."""
    configure_logs(settings.log_level, settings.log_format)
    try:
        check_port(settings)
        tracer = _open_tracer(settings)
        keyring = open_keyring(settings)
        with giving_back():
            parts, engine = _start(settings, console)
    except (ServeError, ValueError, OSError) as error:
        if settings.log_format == "json":
            _log.critical("peft-serve does not start: %s", error)
        else:
            console.print(f"[red]peft-serve does not start:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(exit_of(error)) from None
    warn_of_openness(settings, keyring)
    run_server(parts, engine, console, tracer, keyring)


def _open_tracer(settings: Settings) -> Tracer | None:
    endpoint = settings.otlp_traces_endpoint
    if endpoint is None:
        return None
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(
            f"--otlp-traces-endpoint {endpoint}: give the address of OTLP over HTTP, http://..:4318/v1/traces"
        )
    try:
        from peft_serve.api.tracing import open_tracing
    except ImportError:
        raise ValueError("--otlp-traces-endpoint: needs OpenTelemetry; pip install 'peft-serve[otel]'") from None
    return open_tracing(endpoint, model_name=settings.served_model_name or settings.model)


def _start(settings: Settings, console: Console) -> tuple[ServerParts, Engine]:
    if settings.log_format == "json":
        with BaseProgress(Console(stderr=True, quiet=True)):
            return build(settings, _log.info)
    with BaseProgress(console) as progress:
        return build(settings, progress.say)


def run_server(
    parts: ServerParts,
    engine: Engine,
    console: Console,
    tracer: Tracer | None = None,
    keyring: Keyring | None = None,
) -> None:
    """Serve until told to stop; running requests get `drain_s` to end. Ends the command with 1 if the engine died."""
    settings = parts.settings
    limits = ConnectionLimits(max_connections=room_for(settings.max_connections))
    connections = Connections(limits, new_id=lambda: uuid.uuid4().hex)
    server = Listener(
        uvicorn.Config(
            create_app(parts, tracer=tracer, keyring=keyring),
            host=settings.host,
            port=settings.port,
            log_level="warning",
            timeout_keep_alive=_KEEP_ALIVE_S,
            access_log=False,
            log_config=None,  # its records go where everybody's go
            timeout_graceful_shutdown=round(settings.drain_s) + _LAST_WORDS_S,
            server_header=False,
            http=connections,  # type: ignore[arg-type]  # what makes a connection need not be its class
            ws="none",
        ),
        on_listening=lambda port: _say_ready(parts, port, console),
        on_stopping=engine.close_admission,
        on_overdue=lambda: _cut_short(engine, settings.drain_s),
        is_dead=lambda: engine.snapshot().state is EngineState.DEAD,
        delay_s=settings.drain_delay_s,
        drain_s=settings.drain_s,
    )
    watch = BaseWatch(parts.check_base, lambda: engine.give_up(_CHANGED), parts.metrics, interval_s=_WATCH_S)
    settle_interpreter()
    engine.start()
    watch.start()
    try:
        server.run()
        is_dead = engine.snapshot().state is EngineState.DEAD
    finally:
        watch.stop()
        engine.stop()
    if is_dead:
        raise typer.Exit(Exit.FAILED)


def _cut_short(engine: Engine, drain_s: float) -> None:
    """What still runs is told so: an error in its stream instead of an end without a word."""
    now = engine.snapshot()
    _log.warning("--drain-s %g is over: %d requests are cut off", drain_s, now.num_running + now.num_waiting)
    engine.cut_short()


def _say_ready(parts: ServerParts, port: int, console: Console) -> None:
    if parts.settings.log_format == "json":
        _log.info("ready", extra={"fields": {"host": parts.settings.host, "port": port, "base": parts.base.name}})
    else:
        console.print(_ready_text(parts, port), highlight=False, soft_wrap=True)


def _ready_text(parts: ServerParts, port: int) -> str:
    host = parts.settings.host if parts.settings.host not in ("0.0.0.0", "::") else "localhost"
    url = f"http://{host}:{port}"
    where, inputs = f"{url}/generate", "The weather today"
    if parts.base.is_encoder:
        where = f"{url}/embed" if parts.base.head is None else f"{url}/classify"
    if shipped_adapters(parts.settings.model) is not None:
        where = f"{url}/generate?adapter=twitter-complaints"
        inputs = "@support my order is three weeks late and nobody answers"
    has_keys = parts.settings.api_key is not None or parts.settings.api_keys_file is not None
    key = " -H 'authorization: Bearer YOUR_KEY'" if has_keys else ""
    return (
        f"[green]ready[/green] at {url}  (docs at {url}/docs, metrics at {url}/metrics). Try:\n"
        f"""curl '{where}'{key} -H 'content-type: application/json' -d '{{"inputs": "{inputs}"}}'"""
    )
