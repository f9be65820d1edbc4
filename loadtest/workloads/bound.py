"""bound: how near does the base's own decode step come to what this machine could do?

No adapters and no HTTP: the engine's runner decodes 1 to 32 rows in this process, and each step stands beside
max(bytes / bandwidth, flops / rate) at the rates that torch reaches here with as many threads. Both are taken in turns,
for a machine that is shared gives a third more or less from one minute to the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from loadtest.measure import ratio
from loadtest.plots import Plot
from loadtest.report import Cell, Report
from loadtest.stage import Stage

if TYPE_CHECKING:
    from loadtest.bound import MachineRates, Work

CONTEXT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One batch size: what a step must do, and how long it takes."""

    num_rows: int
    work: "Work"
    step_s: float
    rates: "MachineRates"  # medians of what was reached between the steps


def run(stage: Stage) -> Report:
    """Measure the machine, then the steps."""
    import torch  # with transformers, seconds that the other commands do without

    from loadtest.bound import RateMeter, joined
    from loadtest.steps import StepBench, load_base
    from loadtest.work import Load, base_work

    options = stage.options
    dtype = getattr(torch, options.dtype)
    base = load_base(stage.base(), dtype=dtype, device=options.device, num_threads=options.num_threads)
    steps = [Load(num_rows=rows, context=CONTEXT) for rows in ((1, 4, 16) if options.quick else (1, 2, 4, 8, 16, 32))]
    weights = int(base_work(base, steps[0]).num_bytes)
    meter = RateMeter(device=options.device, dtype=dtype, num_bytes=weights)
    bench = StepBench(base, num_positions=max(load.num_rows for load in steps) * (CONTEXT + 1))
    points = []
    with stage.counting("decode steps", len(steps)) as tick:
        for load in steps:
            step_s, passes = bench.between(load, meter.once, repeats=3 if options.quick else 20)
            rates = joined(passes, median)
            points.append(Point(num_rows=load.num_rows, work=base_work(base, load), step_s=step_s, rates=rates))
            tick()
    return report(points, base=f"{options.base}, {options.dtype}, {options.num_threads} threads")


def report(points: Sequence[Point], *, base: str) -> Report:
    """One row for each batch size."""
    rows: list[tuple[Cell, ...]] = [
        (
            *(one.num_rows, one.work.num_bytes / 1e6, one.work.num_flops / 1e9),
            *(one.rates.bytes_per_s / 1e9, one.rates.flops_per_s / 1e9),
            *(1e3 * one.work.bytes_s(one.rates), 1e3 * one.work.flops_s(one.rates), 1e3 * one.step_s),
            *(ratio(one.step_s, one.work.bound_s(one.rates)), one.num_rows / one.step_s),
        )
        for one in points
    ]
    return Report(
        name="bound",
        title=f"bound: a decode step of the base alone against this machine, {base}",
        columns=(
            "rows",
            "MB",
            "Gflop",
            "GB/s",
            "Gflop/s",
            "bytes ms",
            "flops ms",
            "step ms",
            "step over bound",
            "tokens/s",
        ),
        rows=tuple(rows),
        notes=(
            "GB/s (the best of copy, triad and reading, on as many bytes as a step reads) and Gflop/s (a large "
            "product) are the medians of what was reached in turns with these steps",
        ),
        plot=Plot(
            title="A decode step of the base, and its bound",
            x_label="rows",
            y_label="ms",
            series={"step": tuple((float(one.num_rows), 1e3 * one.step_s) for one in points)},
            bounds={"bound": tuple((float(one.num_rows), 1e3 * one.work.bound_s(one.rates)) for one in points)},
        ),
        settings={
            "bytes_per_s": median(one.rates.bytes_per_s for one in points),
            "flops_per_s": median(one.rates.flops_per_s for one in points),
        },
    )
