"""W9: what do uploads cost those who are being served?

Steady open-loop traffic over warm adapters, without and with a churn beside it: one upload a second, of new names, of
other content under the same name and of the same again, and deletes. Phases are played forwards and backwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtest.acts import sender
from loadtest.adapters import adapter_name
from loadtest.churn import Act, Churn, churning
from loadtest.measure import Summary, mean, percentile, ratio, summarise
from loadtest.plots import Plot
from loadtest.report import Cell, Report
from loadtest.server import RunningServer
from loadtest.stage import Calibration, Stage, palindrome

RHO = 0.5
PHASES = ("quiet", "uploads")
FIELDS = ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s")
SPARE = 4  # adapters that are only uploaded and deleted


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One phase: the traffic's figures and what was done beside it."""

    summary: Summary
    churn: Churn


def run(stage: Stage) -> Report:
    """Play W9; ``--adapters`` is the warm population."""
    count = stage.options.pick_adapters(whole=16, quick=4)
    spare = stage.adapter_folders(count + SPARE)[count:]
    names = tuple(map(adapter_name, range(count)))
    found: dict[str, list[Pass]] = {phase: [] for phase in PHASES}
    with stage.server(num_adapters=count) as server:
        stage.warm(server, names)
        calibration = stage.calibrate(server)
        trace = stage.trace(
            adapters=names, rate_per_s=RHO * calibration.capacity_rps, duration_s=stage.options.duration_s
        )
        for phase in palindrome(list(PHASES)):
            with _beside(stage, server, phase, spare) as churn:
                outcomes = stage.open_loop(server, trace, phase)
            summary = summarise(outcomes, unloaded_ttft_s=calibration.ttft_s)
            found[phase].append(Pass(summary=summary, churn=churn))
    return report(found, calibration)


@contextmanager
def _beside(stage: Stage, server: RunningServer, phase: str, folders: list[Path]) -> Iterator[Churn]:
    if phase == "quiet":
        yield Churn()
        return
    with churning(sender(server.url, api_key=stage.options.api_key), folders) as churn:
        yield churn


def uploads(passes: list[Pass]) -> list[Act]:
    """Every upload of these phases."""
    return [act for one in passes for act in one.churn.acts if act.what.startswith("upload")]


def report(found: dict[str, list[Pass]], calibration: Calibration) -> Report:
    """Times with and without churn, and what the churn itself took."""
    p99 = {phase: mean(one.summary.tpot_p99_s for one in found[phase]) for phase in PHASES}
    rows: list[tuple[Cell, ...]] = [
        (
            phase,
            *(1e3 * mean(getattr(one.summary, field) for one in found[phase]) for field in FIELDS),
            *(sum(one.summary.num_failed for one in found[phase]), sum(one.churn.num_uploads for one in found[phase])),
            1e3 * percentile((act.seconds for act in uploads(found[phase])), 50),
            sum(one.churn.num_failed for one in found[phase]),
            ratio(p99[phase], p99["quiet"]),
        )
        for phase in PHASES
    ]
    return Report(
        name="w9",
        title=f"W9: steady traffic at rho {RHO} (C = {calibration.capacity_rps:.3g} requests/s), uploads beside it",
        columns=(
            *("phase", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "TPOT p99 ms", "failed"),
            *("uploads", "upload p50 ms", "failed acts", "TPOT p99 over quiet"),
        ),
        rows=tuple(rows),
        plot=Plot(
            title="Time per token of warm requests",
            x_label="phase",
            y_label="TPOT, ms",
            series={
                name: tuple(
                    (float(at), 1e3 * mean(getattr(one.summary, field) for one in found[phase]))
                    for at, phase in enumerate(PHASES)
                )
                for name, field in (("p50", "tpot_p50_s"), ("p99", "tpot_p99_s"))
            },
            ticks=PHASES,
        ),
        settings={"capacity_rps": calibration.capacity_rps, "rho": RHO},
    )
