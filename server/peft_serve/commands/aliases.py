"""`peft-serve adapters alias`: names that stand for other adapters, by weight. Each command is one request."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.table import Table
from rich.text import Text

from peft_serve.commands.exits import CommandFailed, Exit
from peft_serve.commands.link import DEFAULT_URL, ServerLink, UrlOption
from peft_serve.commands.speech import JsonOption, Speech

app = typer.Typer(
    help="Names that stand for other adapters: all of the traffic, or shares of it.", no_args_is_help=True
)

NameArgument = Annotated[str, typer.Argument(help="the alias' name", show_default=False)]


@app.command("list")
def list_aliases(url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """List every alias and what it points to."""
    speech = Speech(as_json=as_json)
    with speech.ending(), ServerLink(url) as link:
        found = link.json("GET", "/aliases")
        speech.tell(found, table(found["aliases"]))


@app.command()
def show(name: NameArgument, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """Show an alias and its revisions."""
    speech = Speech(as_json=as_json)
    with speech.ending(), ServerLink(url) as link:
        found = link.json("GET", _address(name))
        speech.tell(found, table([{"name": name, **each} for each in found["revisions"]]))


@app.command("set")
def set_alias(
    name: NameArgument,
    targets: Annotated[
        list[str], typer.Argument(help="adapter, adapter@version, or either with =weight: x@3=90 x@4=10")
    ],
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Point a name to one adapter, or to several by weight. The next request follows it."""
    speech = Speech(as_json=as_json)
    with speech.ending(), ServerLink(url) as link:
        body = {"targets": [parsed(each) for each in targets]}
        found = link.json("PUT", _address(name), json=body)
        speech.tell(found, table([found]))


@app.command()
def rollback(
    name: NameArgument,
    revision: Annotated[int | None, typer.Option("--revision", min=1, help="which; default: the one before")] = None,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Point an alias to what an earlier revision of it did."""
    speech = Speech(as_json=as_json)
    body: dict[str, Any] = {} if revision is None else {"json": {"revision": revision}}
    with speech.ending(), ServerLink(url) as link:
        found = link.json("POST", _address(name) + "/rollback", **body)
        speech.tell(found, table([found]))


@app.command()
def rm(name: NameArgument, url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """Forget an alias. What it points to stays."""
    speech = Speech(as_json=as_json)
    with speech.ending(), ServerLink(url) as link:
        link.json("DELETE", _address(name))
        speech.tell({"name": name, "state": "deleted"}, f"alias {name} is deleted")


def parsed(text: str) -> dict[str, Any]:
    """A target as a body has it, from `x`, `x@3`, `x=90` or `x@3=90`; raises CommandFailed."""
    ref, has_weight, weight = text.partition("=")
    adapter, has_version, version = ref.partition("@")
    try:
        return {
            "adapter": adapter,
            "version": int(version) if has_version else None,
            "weight": float(weight) if has_weight else 1.0,
        }
    except ValueError:
        raise CommandFailed(Exit.USAGE, f"{text}: a target is written adapter, x@3, x=90 or x@3=90") from None


def table(aliases: list[dict[str, Any]]) -> Table | Text:
    """Aliases, or revisions of one, a line each."""
    if not aliases:
        return Text("no aliases; `peft-serve adapters alias set NAME ADAPTER` makes one")
    found = Table("alias", "revision", "points to", "since", box=None, pad_edge=False)
    for each in aliases:
        targets = Text(", ".join(map(_told, each["targets"])))
        found.add_row(Text(each["name"]), str(each["revision"]), targets, Text(each["created"]))
    return found


def _told(target: dict[str, Any]) -> str:
    version = "" if target["version"] is None else f"@{target['version']}"
    return f"{target['adapter']}{version} {100 * target['share']:.3g} %"


def _address(name: str) -> str:
    return f"/aliases/{quote(name, safe='')}"
