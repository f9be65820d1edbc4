"""Plots of the workloads, drawn by matplotlib without a display."""

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Named series over common axes: bars over the labels `ticks`, or lines if `ticks` is empty."""

    title: str
    x_label: str
    y_label: str
    series: dict[str, tuple[tuple[float, float], ...]]
    ticks: tuple[str, ...] = ()
    level: float | None = None
    log_x: bool = False


def draw(plot: Plot, path: Path) -> None:
    """Write the plot as a picture; a dashed line shows `level`."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(plot.series.items()):
        across, up = [point[0] for point in points], [point[1] for point in points]
        if plot.ticks:
            width = 0.8 / len(plot.series)
            axes.bar([x + number * width for x in across], up, width=width, label=name)
        else:
            axes.plot(across, up, marker="o", label=name)
    if plot.ticks:
        axes.set_xticks(range(len(plot.ticks)), plot.ticks)
    if plot.log_x:
        axes.set_xscale("symlog")
    if plot.level is not None:
        axes.axhline(plot.level, linestyle="--", linewidth=1, color="grey")
    axes.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label, ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
