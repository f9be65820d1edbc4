"""`peft-serve top`: what a server does, live: queue, rows by adapter, cache slots, tokens per second."""

from __future__ import annotations

from collections import deque
from contextlib import closing
from typing import Annotated, Final

import typer
from rich.live import Live

from peft_serve.commands.link import DEFAULT_URL, ServerLink, UrlOption
from peft_serve.commands.snapshots import snapshots
from peft_serve.commands.speech import JsonOption, Speech
from peft_serve.commands.top_view import page

_HISTORY: Final = 60
_SETTLING: Final = 4


def top(
    url: UrlOption = DEFAULT_URL,
    once: Annotated[bool, typer.Option("--once", help="print one snapshot and end")] = False,
    as_json: JsonOption = False,
) -> None:
    """Watch a server live, until Ctrl-C. Without a terminal, and with --json, one snapshot is printed."""
    speech = Speech(as_json=as_json)
    with speech.ending(), ServerLink(url) as link, closing(snapshots(link)) as found:
        is_watched = speech.out.is_terminal and not (once or as_json)
        first = next(found)
        for _ in range(0 if is_watched else _SETTLING):  # rates are over the last seconds of being watched
            first = next(found)
        history = deque([float(first["tokens_per_s"])], maxlen=_HISTORY)
        if not is_watched:
            speech.tell(first, page(first, history, link.url))
            return
        try:
            with Live(page(first, history, link.url), console=speech.out, screen=True, auto_refresh=False) as live:
                for snapshot in found:
                    history.append(float(snapshot["tokens_per_s"]))
                    live.update(page(snapshot, history, link.url), refresh=True)
        except KeyboardInterrupt:
            return
