"""`peft-serve config`: the settings a server would start with here, and where each value comes from."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Optional

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from peft_serve.commands.configuration import (
    CONFIG_VARIABLE,
    Configuration,
    ConfigurationInvalid,
    Origin,
    Source,
    configured,
)
from peft_serve.commands.exits import CommandFailed, Exit
from peft_serve.commands.options import with_settings
from peft_serve.commands.speech import Speech

app = typer.Typer(help="Look at the settings.", no_args_is_help=True)

CONFIG_OPTION: Final = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=typer.Option(None, "--config", help=escape(f"YAML file with settings [env: {CONFIG_VARIABLE}]")),
    annotation=Optional[Path],  # noqa: UP045  # read at run time
)
_STYLES: Final = {Source.FLAG: "green", Source.ENVIRONMENT: "cyan", Source.FILE: "yellow", Source.DEFAULT: "dim"}


def settings_of(flags: dict[str, Any], file: Path | None) -> Configuration:
    """The settings of this process; a wrong one is a usage error that names it."""
    try:
        return configured(flags, os.environ, file)
    except ConfigurationInvalid as refusal:
        raise CommandFailed(Exit.USAGE, "\n".join(refusal.lines), code="settings") from None


@app.callback()
def _config() -> None:
    """Look at the settings."""


def _show(config: Path | None, sources: bool, as_json: bool, **flags: Any) -> None:
    """Show every setting with its value, as `serve` would have it with the same flags, environment and file."""
    speech = Speech(as_json=as_json)
    with speech.ending():
        found = settings_of(flags, config)
        values = found.settings.model_dump(mode="json")
        content: Any = values
        if sources:
            content = {
                origin.name: {"value": values[origin.name], "source": origin.source.value, "place": origin.place}
                for origin in found.origins
            }
        speech.tell(content, _table(found.origins, values, with_sources=sources))


def _table(origins: Sequence[Origin], values: dict[str, Any], *, with_sources: bool) -> Table:
    table = Table("setting", "value", box=None, pad_edge=False)
    if with_sources:
        table.add_column("from")
        table.add_column("place")
    for origin in origins:
        value = values[origin.name]
        row = [Text(origin.name), Text("-" if value is None else str(value))]
        if with_sources:
            row += [Text(origin.source.value, style=_STYLES[origin.source]), Text(origin.place)]
        table.add_row(*row)
    return table


def _switch(name: str, option: str, text: str) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=typer.Option(False, option, help=text), annotation=bool
    )


app.command("show")(
    with_settings(
        _show,
        extra=(
            CONFIG_OPTION,
            _switch("sources", "--sources", "tell where each value comes from"),
            _switch("as_json", "--json", "print one JSON document, for programs"),
        ),
    )
)
