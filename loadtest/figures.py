"""The pictures of a result: the workload's own plot, and those that its table holds besides."""

import re
from math import isnan

from loadtest.plots import Plot
from loadtest.report import Report
from loadtest.targets import rows_of

RHO = re.compile(r"\brho ([\d.]+)")


def plots_of(report: Report) -> list[Plot]:
    """Every plot of a result, the most telling first."""
    latency = _latency_over_load(report) if report.name == "w2" else None
    speed = _speed_by_popularity(report) if report.name == "w4" else None
    own = report.plot if speed is None else None  # W4's own shows the same as ratios
    simulated = _by_placement(report) if report.name == "simulate" else []
    return [*(plot for plot in (latency, speed, own) if plot is not None), *simulated]


def _by_placement(report: Report) -> list[Plot]:
    """A simulation's first tokens at the 99th percentile and hits on the device, by case and placement."""
    cases = tuple(dict.fromkeys(str(row[0]) for row in report.rows))
    shown = (
        ("TTFT p99 ms", "The slowest first tokens", "TTFT p99, ms"),
        ("device", "Adapters found on the device", "share of requests"),
    )
    plots = []
    for column, title, y_label in shown:
        series: dict[str, list[tuple[float, float]]] = {}
        for row in rows_of(report):
            case, placement = (str(row[name]) for name in report.columns[:2])
            series.setdefault(placement, []).append((float(cases.index(case)), float(row[column])))
        plots.append(
            Plot(
                title=title,
                x_label=report.columns[0],
                y_label=y_label,
                series={name: tuple(points) for name, points in series.items()},
                ticks=cases,
            )
        )
    return plots


def _latency_over_load(report: Report) -> Plot | None:
    """Time to the first token over rho; None if the table does not hold it."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows_of(report):
        load = RHO.search(str(row.get("load", "")))
        for column, label in (("TTFT p50 ms", "p50"), ("TTFT p99 ms", "p99")):
            cell = row.get(column)
            if load is not None and isinstance(cell, int | float) and not isnan(cell):
                series.setdefault(label, []).append((float(load[1]), float(cell)))
    if not series:
        return None
    return Plot(
        title="Time to the first token over load",
        x_label="rho: offered load over the base model's capacity",
        y_label="TTFT, ms (logarithmic)",
        series={label: tuple(sorted(points)) for label, points in series.items()},
        log_y=True,
    )


def _speed_by_popularity(report: Report) -> Plot | None:
    """Tokens a second by popularity; None if the table does not hold it."""
    rows = [row for row in rows_of(report) if isinstance(row.get("tokens/s"), int | float)]
    base = [float(row["tokens/s"]) for row in rows if row.get("popularity") == "base"]
    if not rows or not base:
        return None
    return Plot(
        title="Tokens/s by what the rows of a batch ask for",
        x_label="which adapters the rows of a batch use",
        y_label="tokens/s",
        series={"tokens/s": tuple((float(at), float(row["tokens/s"])) for at, row in enumerate(rows))},
        ticks=tuple(str(row["popularity"]) for row in rows),
        level=base[0],
        level_label="the base alone",
    )
