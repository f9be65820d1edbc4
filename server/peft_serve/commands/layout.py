"""The options of `serve-ray` beside those of `serve`: one for each field of `Layout`, and where the cluster is."""

from __future__ import annotations

import inspect
from typing import Any, Final, Optional

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape

from peft_serve.cluster.plan import Layout
from peft_serve.commands.options import flag

LAYOUT_NAMES: Final = tuple(Layout.model_fields)
FOR_ONE_SERVER: Final = ("otlp_traces_endpoint", "cache_trace")
TOLD_HERE: Final = {
    "port": "port to listen on, not 0",
    **dict.fromkeys(FOR_ONE_SERVER, "for one server: `serve` alone"),
}
"""What the help says of settings that are not as with `serve`."""


def _as_option(name: str, field: FieldInfo) -> inspect.Parameter:
    told = "" if field.default is None else f" [default: {field.default}]"
    annotation: Any = field.annotation
    if "None" not in str(annotation):
        annotation = Optional[annotation]  # noqa: UP045  # made at run time, of a Literal too
    option = typer.Option(None, flag(name), help=escape(f"{field.description}{told}"), rich_help_panel="Replicas")
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


ADDRESS: Final = inspect.Parameter(
    "address",
    inspect.Parameter.KEYWORD_ONLY,
    default=typer.Option(
        None,
        "--address",
        help="a Ray cluster that runs, such as auto; without it one is started here, and ends with the command",
        rich_help_panel="Replicas",
    ),
    annotation=Optional[str],  # noqa: UP045  # read at run time
)

LAYOUT_OPTIONS: Final = (*(_as_option(name, field) for name, field in Layout.model_fields.items()), ADDRESS)
