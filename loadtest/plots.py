"""Plots of the workloads, drawn by matplotlib without a display.

The colours are Okabe and Ito's, which colour-blind readers tell apart; lines differ by marker, bars by hatch as
well. What a figure is held against (a target level, a byte bound) is black or grey: a dashed line, a mark across bars.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from math import isnan, nan
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

Points = tuple[tuple[float, float], ...]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#666666")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "++", "oo")
METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
INK, FAINT = "#222222", "#8a8a8a"
LYING = 7
"""From this many labels on, bars lie, so that the labels stay readable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Named series over common axes: bars over the labels `ticks`, or lines if `ticks` is empty. `level` is a
    line all figures are held against (`level_label` says what it is); `bounds` are named series drawn dashed, or
    as marks across the bars where there are bars."""

    title: str
    x_label: str
    y_label: str
    series: dict[str, Points]
    ticks: tuple[str, ...] = ()
    level: float | None = None
    log_x: bool = False
    log_y: bool = False
    level_label: str = ""
    bounds: dict[str, Points] = field(default_factory=dict)

    @classmethod
    def read(cls, fields: dict[str, Any]) -> "Plot":
        """The plot that was kept as JSON, where tuples have become lists and NaN has become null."""
        kept = dict(fields)
        for name in ("series", "bounds"):
            kept[name] = {label: tuple(map(_point, points)) for label, points in kept.get(name, {}).items()}
        kept["ticks"] = tuple(kept.get("ticks", ()))
        return cls(**kept)


def _point(kept: Sequence[float | None]) -> tuple[float, float]:
    x, y = (nan if value is None else value for value in kept)
    return x, y


def draw(plot: Plot, path: Path) -> None:
    """Write the plot as a picture, in the format that the path's ending names."""
    _figure(plot).savefig(path, dpi=120)


def svg(plot: Plot) -> str:
    """The plot as an ``<svg>`` element that stands in a page; its text stays text."""
    drawing = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.title}):
        _figure(plot).savefig(drawing, format="svg", metadata={"Date": None}, transparent=True)
    text = drawing.getvalue()
    text = METADATA.sub("", text[text.index("<svg") :])
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(plot.title)}"', 1)


def _figure(plot: Plot) -> Figure:
    lying = len(plot.ticks) >= LYING
    height = 1.4 + 0.32 * len(plot.ticks) if lying else 4.0
    figure = Figure(figsize=(7.2, max(4.0, height)), layout="constrained")
    axes = figure.add_subplot()
    if plot.ticks:
        _bars(axes, plot, lying=lying)
    else:
        _lines(axes, plot)
    _dress(axes, plot, lying=lying)
    return figure


def _lines(axes: Axes, plot: Plot) -> None:
    for number, (name, points) in enumerate(plot.series.items()):
        axes.plot(
            *_columns(points),
            label=name,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            linewidth=1.8,
        )
    for name, points in plot.bounds.items():
        axes.plot(*_columns(points), label=name, color=INK, linestyle=(0, (4, 2)), linewidth=1.2)


def _bars(axes: Axes, plot: Plot, *, lying: bool) -> None:
    thick = 0.8 / max(1, len(plot.series))
    place = axes.barh if lying else axes.bar
    for number, (name, points) in enumerate(plot.series.items()):
        across, up = _columns(points)
        shifted = [x + (number - (len(plot.series) - 1) / 2) * thick for x in across]
        colour, hatch = COLOURS[number % len(COLOURS)], HATCHES[number % len(HATCHES)]
        drawn = place(shifted, up, thick, label=name, color=colour, hatch=hatch, edgecolor="white", linewidth=0.6)
        if len(plot.series) == 1:
            labels = axes.bar_label(drawn, labels=[_short(value) for value in up], padding=3, fontsize=9, color=INK)
            for label in labels:
                label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85})
    for name, points in plot.bounds.items():
        across, up = _columns(points)
        low, high = [x - 0.42 for x in across], [x + 0.42 for x in across]
        marks = axes.vlines if lying else axes.hlines
        marks(up, low, high, label=name, colors=INK, linewidth=2.2)


def _dress(axes: Axes, plot: Plot, *, lying: bool) -> None:
    if plot.level is not None:
        line = axes.axvline if lying else axes.axhline
        line(plot.level, linestyle="--", linewidth=1, color=FAINT)
        along = axes.get_xaxis_transform() if lying else axes.get_yaxis_transform()
        place = (plot.level, 1.0) if lying else (1.0, plot.level)
        side = "center" if lying else "right"
        axes.text(*place, plot.level_label, transform=along, va="bottom", ha=side, fontsize=9, color=FAINT)
    axes.set_title(plot.title, loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.set_xlabel(plot.y_label if lying else plot.x_label)
    axes.set_ylabel(plot.x_label if lying else plot.y_label)
    if plot.ticks:
        _label(axes, plot.ticks, lying=lying)
    if plot.log_x:
        axes.set_xscale("symlog")
        shown = sorted({x for points in plot.series.values() for x, _ in points})
        axes.set_xticks(shown, [f"{x:g}" for x in shown])
        axes.minorticks_off()
    _scale(axes, plot, lying=lying)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x" if lying else "y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    if len(plot.series) > 1 or plot.bounds:
        axes.legend(frameon=False, fontsize=9)


def _label(axes: Axes, ticks: tuple[str, ...], *, lying: bool) -> None:
    if lying:
        axes.set_yticks(range(len(ticks)), ticks)
        axes.invert_yaxis()
    else:
        axes.set_xticks(range(len(ticks)), ticks)


def _scale(axes: Axes, plot: Plot, *, lying: bool) -> None:
    if lying:
        axes.set_xlim(0, None)
        axes.margins(x=0.1)
    elif plot.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
    else:
        axes.margins(y=0.12)
        axes.set_ylim(0, None)


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]


def _short(value: float) -> str:
    return "" if isnan(value) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
