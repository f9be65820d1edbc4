"""A snapshot of a server as a page on a terminal. Pure functions; names of adapters are text, never markup."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from peft_serve.commands.adapter_tables import size

_PALETTE: Final = (
    "cyan", "magenta", "green", "yellow", "blue", "bright_red", "bright_cyan", "bright_magenta", "bright_green",
    "bright_yellow", "bright_blue", "orange3",
)  # fmt: skip
_BARS: Final = " ▁▂▃▄▅▆▇█"
_STATES: Final = {"running": "green", "starting": "yellow", "draining": "yellow"}
_MAX_LINES: Final = 12  # adapters told by name; the others are counted


def colour_of(adapter: str) -> str:
    """The same for the same name, in every snapshot and every terminal."""
    return "white" if adapter == "base" else _PALETTE[zlib.crc32(adapter.encode()) % len(_PALETTE)]


def spark(values: Sequence[float]) -> str:
    """Values as a row of bars, the largest as high as a line."""
    most = max(values, default=0.0)
    return "".join(_BARS[round(8 * value / most)] if most > 0 else _BARS[0] for value in values)


def page(snapshot: Mapping[str, Any], history: Sequence[float], url: str) -> RenderableType:
    """Everything on one page: figures, queue, rows and slots."""
    state = str(snapshot["state"])
    title = Text.assemble("peft-serve ", (url, "bold"), "  ", (state, _STATES.get(state, "red")))
    return Group(title, _figures(snapshot, history), _work(snapshot), _slots(snapshot))


def _figures(snapshot: Mapping[str, Any], history: Sequence[float]) -> Panel:
    grid = Table.grid(padding=(0, 2))
    for _ in range(6):
        grid.add_column()
    share, step = snapshot.get("prefix_cache_hit_share"), snapshot.get("step_ms")
    grid.add_row(
        "tokens/s", _number(snapshot["tokens_per_s"]), "prompt tokens/s", _number(snapshot["prompt_tokens_per_s"]),
        "requests/s", _number(snapshot["requests_per_s"]),
    )  # fmt: skip
    grid.add_row(
        "step", "-" if step is None else f"{step:.1f} ms", "KV cache", _meter(snapshot["kv_usage"]),
        "prefix cache", "-" if share is None else f"{share:.0%} found",
    )  # fmt: skip
    return Panel(Group(grid, Text(spark(history), style="cyan")), title="now", title_align="left", border_style="dim")


def _work(snapshot: Mapping[str, Any]) -> Table:
    """Who waits and who runs, side by side."""
    queue, rows = snapshot["queue"], snapshot["rows"]
    waiting = Table.grid(padding=(0, 1))
    for each in queue["adapters"][:_MAX_LINES]:
        told = "" if each["waiting"] is None else str(each["waiting"])
        waiting.add_row(Text(each["name"], style=colour_of(each["name"])), told)
    running = Table.grid(padding=(0, 1))
    counts = Counter(row["adapter"] for row in rows)
    for adapter, count in counts.most_common(_MAX_LINES):
        phases = [row["phase"] for row in rows if row["adapter"] == adapter]
        running.add_row(Text(adapter, style=colour_of(adapter)), str(count), _blocks(adapter, phases))
    if len(counts) > _MAX_LINES:
        running.add_row(f"and {len(counts) - _MAX_LINES} more adapters", "", "")
    num_running = len(rows) if rows else int(snapshot.get("num_running", 0))
    loading = f", {queue['loading']} loading" if queue["loading"] else ""
    page = Table.grid(expand=True)
    page.add_column(ratio=1)
    page.add_column(ratio=2)
    page.add_row(
        Panel(waiting, title=f"queue: {queue['waiting']}{loading}", title_align="left", border_style="dim"),
        Panel(running, title=f"batch: {num_running} rows", title_align="left", border_style="dim"),
    )
    return page


def _blocks(adapter: str, phases: Sequence[str]) -> Text:
    """A block for each row; those that still read their prompt are lighter."""
    return Text("".join("▒" if phase == "prefill" else "█" for phase in phases), style=colour_of(adapter))


def _slots(snapshot: Mapping[str, Any]) -> Panel:
    slots = sorted(snapshot["slots"], key=lambda each: int(each["slot"]))
    strip, names = Text(), Text()
    for each in slots:
        adapter = str(each["adapter"])
        strip.append("◆" if each["pinned"] else "■", style=colour_of(adapter))
        names.append(f"{adapter}{'*' if each['pinned'] else ''} ", style=colour_of(adapter))
    strip.append("·" * max(0, int(snapshot["num_slots"]) - len(slots)), style="dim")
    told = ", ".join(
        f"{name}: {tier['adapters']} adapters in {size(tier['bytes'])}" for name, tier in snapshot["tiers"].items()
    )
    title = f"slots: {len(slots)} of {snapshot['num_slots']}"
    return Panel(Group(strip, names, Text(told, style="dim")), title=title, title_align="left", border_style="dim")


def _meter(share: float, width: int = 10) -> Text:
    full = round(width * min(1.0, max(0.0, share)))
    return Text.assemble(
        ("█" * full, "red" if share > 0.95 else "green"), ("░" * (width - full), "dim"), f" {share:.0%}"
    )


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
