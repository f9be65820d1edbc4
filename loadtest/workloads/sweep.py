"""W2 and W3: latency under load, over the rate (w2) and over bursts and skew (w3). Open loop, many adapters."""

from dataclasses import dataclass
from math import isnan, nan

from loadtest.adapters import adapter_name
from loadtest.measure import Summary, summarise
from loadtest.plots import Plot
from loadtest.report import Cell, Report
from loadtest.stage import Calibration, Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One phase of a sweep."""

    rho: float
    cv: float = 1.0
    popularity: str = "slora:1"


def rates(*, quick: bool) -> list[Point]:
    """W2's points."""
    return [Point(rho=rho) for rho in ((0.5, 1.0) if quick else (0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 1.5))]


def bursts(*, quick: bool) -> list[Point]:
    """W3's points: bursts first, then skew, at a load that a steady stream carries well."""
    cvs, popularities = ((1.0, 4.0), ("slora:0.1",)) if quick else ((1.0, 2.0, 4.0, 8.0), SKEWS)
    return [Point(rho=0.75, cv=cv) for cv in cvs] + [Point(rho=0.75, popularity=skew) for skew in popularities]


SKEWS = ("slora:1", "slora:0.3", "slora:0.1", "zipf:1", "drift")


def run(stage: Stage, name: str) -> Report:
    """Play ``w2`` or ``w3``."""
    quick = stage.options.quick
    points = rates(quick=quick) if name == "w2" else bursts(quick=quick)
    count = stage.options.pick_adapters(whole=200, quick=8)
    names = tuple(map(adapter_name, range(count)))
    with stage.server(num_adapters=count) as server:
        stage.warm(server, names)
        calibration = stage.calibrate(server)
        found = []
        for point in points:
            trace = stage.trace(
                adapters=names,
                popularity=point.popularity,
                cv=point.cv,
                rate_per_s=point.rho * calibration.capacity_rps,
                duration_s=stage.options.duration_s,
            )
            outcomes = stage.open_loop(server, trace, f"rho={point.rho} cv={point.cv} {point.popularity}")
            found.append(summarise(outcomes, unloaded_ttft_s=calibration.ttft_s))
    return report(name, calibration, points, found, count)


def report(name: str, calibration: Calibration, points: list[Point], found: list[Summary], count: int) -> Report:
    """One row a point."""
    rows: list[tuple[Cell, ...]] = [
        (
            *(f"rho {point.rho:g}, cv {point.cv:g}, {point.popularity}", one.tokens_per_s),
            *(1e3 * one.ttft_p50_s, 1e3 * one.ttft_p99_s, 1e3 * one.tpot_p50_s, 1e3 * one.tpot_p99_s),
            *(one.share_in_time, one.num_failed),
        )
        for point, one in zip(points, found, strict=True)
    ]
    late = next((point.rho for point, one in zip(points, found, strict=True) if one.share_in_time < 0.9), nan)
    return Report(
        name=name,
        title=(
            f"{name.upper()}: {count} adapters (C = {calibration.capacity_rps:.3g} requests/s, "
            f"T0 = {1e3 * calibration.ttft_s:.3g} ms, t0 = {1e3 * calibration.tpot_s:.3g} ms)"
        ),
        columns=(
            *("load", "tokens/s", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "TPOT p99 ms"),
            *("TTFT <= 5 T0", "failed"),
        ),
        rows=tuple(rows),
        notes=(
            "90 % of first tokens or more are in time at every point"
            if isnan(late)
            else f"the first point with fewer than 90 % of first tokens in time has rho {late:g}",
        ),
        plot=_plot(name, points, found),
        settings={"capacity_rps": calibration.capacity_rps, "T0_s": calibration.ttft_s, "t0_s": calibration.tpot_s},
    )


def _plot(name: str, points: list[Point], found: list[Summary]) -> Plot:
    """Over the load in W2; in W3, whose points have nothing in common to be ordered by, bars."""
    is_over_load = name == "w2"
    at = [point.rho for point in points] if is_over_load else list(map(float, range(len(points))))
    ticks = tuple(f"cv {point.cv:g}, {point.popularity}" for point in points)
    return Plot(
        title="Share of first tokens within 5 T0",
        x_label="rho: requests a second over the base's capacity" if is_over_load else "bursts and skew",
        y_label="share in time",
        series={"share": tuple((x, one.share_in_time) for x, one in zip(at, found, strict=True))},
        ticks=() if is_over_load else ticks,
    )
