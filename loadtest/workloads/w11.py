"""W11: what does each kind of term cost a decode step?

Sixteen rows of one token, in this process, with 1, 4 and 16 distinct adapters of one term, in turns with steps of
the base alone. Beside the ratio stands the *byte bound*: what the step would take over the base's if
reading the weights and the terms once were all it did.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loadtest.measure import ratio
from loadtest.plots import Plot
from loadtest.report import Cell, Report
from loadtest.stage import Stage

if TYPE_CHECKING:
    from loadtest.terms import Timed

COUNTS = (1, 4, 16)
MAX_BYTES = 2**31


def run(stage: Stage, terms: Sequence[str] = ()) -> Report:
    """Time every term, or the ones named."""
    import torch  # with transformers, seconds that the other commands do without

    from loadtest.terms import TERMS, load_bench, time_term

    options = stage.options
    unknown = sorted(set(terms) - set(TERMS))
    if unknown:
        raise ValueError(f"no term {unknown[0]!r}; there are {', '.join(TERMS)}")
    bench = load_bench(
        stage.base(), dtype=getattr(torch, options.dtype), device=options.device, num_threads=options.num_threads
    )
    repeats = 5 if options.quick else 40
    found = [
        timed
        for term in terms or TERMS
        for timed in time_term(bench, term, COUNTS, repeats=repeats, max_bytes=MAX_BYTES)
    ]
    return report(found, base_bytes=bench.num_bytes, base=options.base)


def report(found: Sequence["Timed"], *, base_bytes: int, base: str) -> Report:
    """Every point over the base, and over its byte bound."""
    rows: list[tuple[Cell, ...]] = []
    for one in found:
        bound = 1 + one.num_bytes / base_bytes
        over = ratio(one.step_s, one.base_s)
        rows.append((one.term, one.num_adapters, 1e3 * one.base_s, 1e3 * one.step_s, over, bound, ratio(over, bound)))
    worst = max(rows, key=lambda row: float(row[4]), default=None)
    names = tuple(dict.fromkeys(one.term for one in found))
    return Report(
        name="w11",
        title=f"W11: a decode step of 16 rows by kind of term, base {base}",
        columns=("term", "adapters", "base ms", "step ms", "over base", "byte bound", "over bound"),
        rows=tuple(rows),
        notes=()
        if worst is None
        else (f"dearest: {worst[0]} with {worst[1]} adapters, {worst[4]:.2f} times the base",),
        plot=Plot(
            title="Decode step over the base's",
            x_label="kind of term",
            y_label="times the base",
            series={
                f"{count} adapters": tuple(
                    (float(names.index(one.term)), ratio(one.step_s, one.base_s))
                    for one in found
                    if one.num_adapters == count
                )
                for count in COUNTS
            },
            ticks=names,
            level=1.0,
        ),
        settings={"base_bytes": base_bytes, "max_bytes": MAX_BYTES},
    )
