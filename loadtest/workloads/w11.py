"""W11: what does each kind of adapter cost a step?

In this process: decode steps of sixteen rows of one token, and prefills of 64 to 4096 tokens in four rows, with
1 .. 16 distinct adapters of one kind, in turns with the same rows without adapters. Beside each ratio stand two
bounds: the *byte bound*, what the step would take over the base's if reading weights, keys, values and terms once were
all there is to it; and the *bound*, the same for whichever takes longer at this machine's measured rates, reading or
arithmetic.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loadtest.measure import ratio
from loadtest.plots import Plot
from loadtest.report import Cell, Report
from loadtest.stage import Stage

if TYPE_CHECKING:
    from loadtest.bound import MachineRates
    from loadtest.timed import Timed
    from loadtest.work import Load

MAX_BYTES = 2**31
COUNTS, COUNTS_QUICK, PREFILL_COUNTS = (1, 2, 4, 8, 16), (1, 4, 16), (1, 4)
DECODE_ROWS, CONTEXT, PREFILL_ROWS = 16, 32, 4
TARGET_FACTOR, TARGET_SLACK = 1.3, 0.01
"""An adapter should cost a step no more than this many times its bound, and this share of the base's step."""

PHASES = ("decode", "prefill")


def run(stage: Stage, terms: Sequence[str] = (), phases: Sequence[str] = ()) -> Report:
    """Time every term in both phases, or the ones named."""
    import torch  # with transformers, seconds that the other commands do without

    from loadtest.bound import measure_rates
    from loadtest.kinds import KINDS
    from loadtest.steps import StepBench, load_base
    from loadtest.timed import time_term
    from loadtest.work import base_work

    options = stage.options
    unknown = sorted(set(terms) - set(KINDS))
    if unknown:
        raise ValueError(f"no term {unknown[0]!r}; there are {', '.join(KINDS)}")
    dtype = getattr(torch, options.dtype)
    base = load_base(stage.base(), dtype=dtype, device=options.device, num_threads=options.num_threads)
    steps = loads(phases or PHASES, max_context=base.shape.max_positions or 2048, quick=options.quick)
    bench = StepBench(base, num_positions=max(load.num_rows * (load.context + load.num_tokens) for load in steps))
    weights = int(base_work(base, steps[0]).num_bytes)
    rates = measure_rates(device=options.device, dtype=dtype, num_bytes=weights, quick=options.quick)
    found: list[Timed] = []
    names = list(terms or KINDS)
    with stage.counting("terms", len(names)) as tick:
        for term in names:
            for is_prefill in (False, True):
                repeats = {load: times(load, quick=options.quick) for load in steps if is_prefill != bool(load.context)}
                counts = PREFILL_COUNTS if is_prefill else COUNTS_QUICK if options.quick else COUNTS
                found += time_term(bench, term, repeats, counts, max_bytes=MAX_BYTES)
            tick()
    return report(found, rates=rates, base=options.base)


def loads(phases: Sequence[str], *, max_context: int, quick: bool) -> list["Load"]:
    """The steps to time; prefills longer than the rows' contexts allow are left out."""
    from loadtest.work import Load

    unknown = sorted(set(phases) - set(PHASES))
    if unknown:
        raise ValueError(f"no phase {unknown[0]!r}; there are {', '.join(PHASES)}")
    found = []
    if "decode" in phases:
        found.append(Load(num_rows=DECODE_ROWS, context=CONTEXT))
    if "prefill" in phases:
        totals = (64,) if quick else (64, 256, 1024, 4096)
        each = (total // PREFILL_ROWS for total in totals)
        found += [Load(num_rows=PREFILL_ROWS, num_tokens=count) for count in each if count < max_context]
    return found


def times(load: "Load", *, quick: bool) -> int:
    """How often a step is timed: the longer it takes, the less a hiccup of the machine weighs in it."""
    return 5 if quick else max(1, min(40, 2048 // load.total_tokens))


def report(found: Sequence["Timed"], *, rates: "MachineRates", base: str) -> Report:
    """Every point over the base, and over its bound."""
    rows: list[tuple[Cell, ...]] = []
    for one in found:
        over, by_bytes = ratio(one.step_s, one.base_s), byte_ratio(one)
        is_met = over - 1 <= TARGET_FACTOR * (by_bytes - 1) + TARGET_SLACK
        times = (1e3 * one.base_s, 1e3 * one.step_s, over)
        bounds = (by_bytes, bound_ratio(one, rates), "yes" if is_met else "no")
        rows.append((one.term, phase(one), one.num_adapters, *times, *bounds))
    worst = max(rows, key=lambda row: float(row[5]), default=None)
    num_met = sum(row[-1] == "yes" for row in rows)
    return Report(
        name="w11",
        title=f"W11: a step by kind of term, base {base}",
        columns=(
            *("term", "step", "adapters", "base ms", "step ms", "over base", "byte bound", "bound", "within target"),
        ),
        rows=tuple(rows),
        notes=()
        if worst is None
        else (
            f"dearest: {worst[0]} with {worst[2]} adapters ({worst[1]}), {worst[5]:.2f} times the base",
            f"{num_met} of {len(rows)} points cost at most {TARGET_FACTOR:g} times their byte bound and "
            f"{TARGET_SLACK:.0%} of a step, which is the target",
            f"measured: {rates.bytes_per_s / 1e9:.3g} GB/s, {rates.flops_per_s / 1e9:.3g} Gflop/s",
        ),
        plot=_plot(found, rates),
        settings={"max_bytes": MAX_BYTES, "bytes_per_s": rates.bytes_per_s, "flops_per_s": rates.flops_per_s},
    )


def byte_ratio(one: "Timed") -> float:
    """Bytes to read with the terms, over those without."""
    return 1 + ratio(one.term_work.num_bytes, one.base_work.num_bytes)


def bound_ratio(one: "Timed", rates: "MachineRates") -> float:
    """The bound with the terms, over the bound without."""
    return ratio((one.base_work + one.term_work).bound_s(rates), one.base_work.bound_s(rates))


def phase(one: "Timed") -> str:
    """``decode 16`` (rows) or ``prefill 256`` (tokens in all)."""
    load = one.load
    return f"decode {load.num_rows}" if load.context else f"prefill {load.total_tokens}"


def _plot(found: Sequence["Timed"], rates: "MachineRates") -> Plot:
    """The dearest number of adapters in the first phase: measured beside the bound, by term."""
    first = [one for one in found if phase(one) == phase(found[0])]
    names = tuple(dict.fromkeys(one.term for one in first))
    most = {one.term: one for one in first}  # counts ascend, so the last is the largest
    return Plot(
        title=f"Step over the base's with the most adapters, {phase(found[0])}" if found else "no points",
        x_label="kind of term",
        y_label="times the base",
        series={
            "measured": tuple((float(at), ratio(most[n].step_s, most[n].base_s)) for at, n in enumerate(names)),
        },
        bounds={"bound": tuple((float(at), bound_ratio(most[n], rates)) for at, n in enumerate(names))},
        ticks=names,
        level=1.0,
    )
