"""The command `peft-serve`.

Puts the subcommands together. Nothing here knows torch: a command that only asks a server starts in half a second,
and what loads a base is imported when it is run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

import peft_serve
from peft_serve.commands import adapters, bench, config, doctor, generate, keys, top
from peft_serve.commands.config import CONFIG_OPTION, settings_of
from peft_serve.commands.layout import LAYOUT_NAMES, LAYOUT_OPTIONS, TOLD_HERE
from peft_serve.commands.options import with_settings
from peft_serve.commands.speech import Speech

app = typer.Typer(
    name="peft-serve",
    help="One resident base model, many PEFT adapters in one batch.",
    no_args_is_help=True,
    add_completion=True,
)


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


def _serve(config: Path | None, **flags: Any) -> None:
    """Start the server on a base: demo-llama, demo-t5, a model folder, or a Hugging Face hub id."""
    speech = Speech()
    with speech.ending():
        settings = settings_of(flags, config).settings
        from peft_serve.commands.serving import serve

        serve(settings, speech.err)


def _serve_ray(config: Path | None, address: str | None, **flags: Any) -> None:
    """Start many replicas of the server behind one address, on Ray Serve (needs peft-serve[ray])."""
    speech = Speech()
    with speech.ending():
        layout = {name: flags.pop(name) for name in LAYOUT_NAMES}
        settings = settings_of(flags, config).settings
        from peft_serve.commands.serving_ray import layout_of, serve_ray

        serve_ray(settings, layout_of(**layout), address, speech.err)


app.command("serve")(with_settings(_serve, extra=(CONFIG_OPTION,)))
app.command("serve-ray")(with_settings(_serve_ray, extra=(CONFIG_OPTION, *LAYOUT_OPTIONS), told=TOLD_HERE))
app.add_typer(adapters.app, name="adapters")
app.add_typer(config.app, name="config")
app.add_typer(keys.app, name="keys")
app.command("generate")(generate.generate)
app.command("top")(top.top)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """The entry point of the console script."""
    sys.exit(app())
