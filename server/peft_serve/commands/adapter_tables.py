"""Adapters as tables and lines for people. Pure functions over the server's answers; names stay text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

from rich.markup import escape
from rich.table import Table
from rich.text import Text

_WHERE: Final = {"device": "green", "host": "yellow", "disk": "dim"}
_FACTS: Final = (
    "version", "digest", "state", "problem", "created", "peft_type", "task_type", "base", "rank", "bytes",
    "num_tensors", "num_sites", "modules", "num_virtual_tokens", "num_tasks", "head", "num_versions", "residency",
    "pinned", "in_flight", "read_only", "warnings",
)  # fmt: skip


def address(name: str, act: str = "") -> str:
    """The path of an adapter, or of something that is done to it."""
    path = f"/adapters/{quote(name, safe='@:')}"
    return f"{path}/{act}" if act else path


def size(num_bytes: float | None) -> str:
    """Bytes in a unit that fits."""
    if num_bytes is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def listed(adapters: Sequence[Mapping[str, Any]]) -> Table | Text:
    """One line an adapter."""
    if not adapters:
        return Text("no adapters; `peft-serve adapters push FOLDER` uploads one")
    table = Table("name", "version", "method", "rank", "bytes", "where", "running", "state", box=None, pad_edge=False)
    for each in adapters:
        where = each["residency"] + (" pinned" if each["pinned"] else "")
        state = Text(each["state"], style="" if each["state"] == "active" else "red")
        table.add_row(
            Text(each["name"]), _or_dash(each["version"]), _or_dash(each["peft_type"]), _or_dash(each["rank"]),
            size(each["bytes"]), Text(where, style=_WHERE.get(each["residency"], "")), str(each["in_flight"]), state,
        )  # fmt: skip
    return table


def facts(found: Mapping[str, Any], *, title: str = "") -> Table:
    """Everything about one adapter, a line a fact; what is unknown is left out."""
    table = Table(box=None, pad_edge=False, show_header=bool(title))
    table.add_column(escape(title), style="bold", no_wrap=bool(title))
    table.add_column("", overflow="fold")
    if "name" in found:
        table.add_row("name", Text(found["name"]))
    for key in _FACTS:
        value = found.get(key)
        if value not in (None, [], ""):
            table.add_row(key.replace("_", " "), Text(_said(key, value)))
    return table


def versions(found: Sequence[Mapping[str, Any]]) -> Table:
    """One line a version."""
    table = Table("version", "created", "method", "rank", "bytes", "state", box=None, pad_edge=False)
    table.add_column("digest", overflow="fold")
    for each in found:
        table.add_row(
            str(each["version"]), _or_dash(each["created"]), _or_dash(each["peft_type"]), _or_dash(each["rank"]),
            size(each["bytes"]), each["state"], each["digest"],
        )  # fmt: skip
    return table


def published(found: Mapping[str, Any]) -> Text:
    """What an upload came to."""
    previous = found.get("previous") or {}
    same = previous.get("digest") == found["digest"]
    act = "would be" if found.get("dry_run") else "is still" if same else "is"
    text = Text(f"{found['name']} {act} version {found['version']}: {_or_dash(found['peft_type'])} of rank ")
    text.append(f"{_or_dash(found['rank'])}, {found['num_tensors']} tensors in {found['num_sites']} places, ")
    text.append(f"{size(found['bytes'])}\n{found['digest']}")
    for warning in found.get("warnings") or ():
        text.append(f"\nwarning: {warning}", style="yellow")
    return text


def _said(key: str, value: Any) -> str:
    if key == "bytes":
        return f"{size(value)} ({value})"
    if isinstance(value, list):
        return "\n".join(map(str, value)) if key == "warnings" else ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)
