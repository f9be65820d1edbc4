"""`peft-serve doctor`: what is wrong with an installation, a base, an adapter or a server, and what to do about it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from peft_serve.commands.checkup.finding import Finding, State, is_healthy, told
from peft_serve.commands.checkup.machine import Machine
from peft_serve.commands.configuration import ConfigurationInvalid, configured
from peft_serve.commands.exits import Exit
from peft_serve.commands.link import ServerLink
from peft_serve.commands.speech import JsonOption, Speech
from peft_serve.config import Settings

_SIGNS: Final = {State.FINE: ("✓", "green"), State.ODD: ("!", "yellow"), State.WRONG: ("✗", "red")}


def doctor(
    base: Annotated[
        str | None, typer.Option("--base", "--model", help="a base: demo-llama, a folder, or a hub id")
    ] = None,
    adapter: Annotated[
        list[Path] | None, typer.Option("--adapter", "-a", help="a checkpoint's folder or archive; several times")
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="a server that runs")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML file with settings")] = None,
    store: Annotated[str | None, typer.Option("--store", help="the folder of uploads, or s3://bucket/prefix")] = None,
    port: Annotated[int | None, typer.Option("--port", min=0, max=65535, help="where a server would listen")] = None,
    as_json: JsonOption = False,
) -> None:
    """Look for what is wrong. Without options: with this installation, as `serve` would start here.

    --base looks at a base, --adapter at adapters (on that base, if one is named), --url at a server that runs.
    Nothing is changed or downloaded, and no weights are loaded. Exits with 1 when something is wrong.
    """
    speech = Speech(as_json=as_json)
    findings: list[Finding] = []
    with speech.ending():
        settings, problems = _settings({"store": store, "port": port}, config)
        findings += problems
        if base is not None:
            findings += _of_base(base, settings)
        for each in adapter or ():
            findings += _of_adapter(each, settings, base)
        if url is not None:
            findings += _of_server(url)
        if base is None and not adapter and url is None:
            findings += _of_installation(settings)
        speech.tell(_content(findings), _page(findings))
    if not is_healthy(findings):
        raise typer.Exit(Exit.FAILED)


def _settings(flags: dict[str, Any], config: Path | None) -> tuple[Settings, list[Finding]]:
    """The settings; where they are wrong, what is wrong, and the defaults to go on with."""
    try:
        return configured(flags, os.environ, config).settings, []
    except ConfigurationInvalid as refusal:
        given = {name: value for name, value in flags.items() if value is not None}
        findings = [told("settings", f"{line}; `peft-serve config show --sources` tells where each is said")
                    if "; " not in line else told("settings", line) for line in refusal.lines]  # fmt: skip
        return Settings.model_construct(**given), findings


def _of_installation(settings: Settings) -> Iterator[Finding]:
    from peft_serve.commands.checkup.installation import look_at_installation

    is_folder = settings.store is not None and "://" not in settings.store
    store = Path(settings.store or "") if is_folder else _default_store(settings)
    return look_at_installation(Machine(), settings, store)


def _default_store(settings: Settings) -> Path:
    name = settings.served_model_name or settings.model
    name = Path(name).name if Path(name).is_dir() else name
    return Path.home() / ".local" / "share" / "peft-serve" / name.replace("/", "--")


def _of_base(base: str, settings: Settings) -> Iterator[Finding]:
    from peft_serve.commands.checkup.base import look_at_base  # it knows torch, which takes seconds

    return look_at_base(base, Machine(), settings)


def _of_adapter(path: Path, settings: Settings, base: str | None) -> Iterator[Finding]:
    from peft_serve.commands.checkup.adapter import look_at_adapter

    return look_at_adapter(path, settings, base=base)


def _of_server(url: str) -> list[Finding]:
    from peft_serve.commands.checkup.server import look_at_server

    with ServerLink(url) as link:
        return [*look_at_server(link, time.time)]


def _content(findings: Sequence[Finding]) -> dict[str, Any]:
    told = [
        {"place": each.place, "state": each.state.value, "fact": each.fact, "way_out": each.way_out or None}
        for each in findings
    ]
    return {"healthy": is_healthy(findings), "findings": told}


def _page(findings: Sequence[Finding]) -> RenderableType:
    lines: list[RenderableType] = []
    for each in findings:
        sign, colour = _SIGNS[each.state]
        lines.append(Text.assemble((f"{sign} ", colour), (each.place, "bold"), f": {each.fact}"))
        if each.way_out:
            lines.append(Text.assemble("  → ", (each.way_out, colour)))
    num_wrong = sum(each.state is State.WRONG for each in findings)
    num_odd = sum(each.state is State.ODD for each in findings)
    lines.append(Text(f"{num_wrong} wrong, {num_odd} to look at" if num_wrong or num_odd else "nothing is wrong"))
    return Group(*lines)
