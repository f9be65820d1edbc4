"""A decode step of the base alone, 1 to 64 rows, against what this machine could do.

The least a step can take is its bytes (weights, and keys and values of its context, read once) over the bandwidth that
was measured in this call, or its arithmetic over the rate of a matrix product, whichever is longer.
"""

import warnings
from functools import partial
from typing import Final

import torch

from loadtest.gpu.facts import ceilings
from loadtest.gpu.ground import Ground
from loadtest.gpu.results import Figures, Found, Value
from loadtest.gpu.rows import Steps
from loadtest.gpu.shapes import decoder
from loadtest.gpu.timing import Act, in_turns
from loadtest.work import Load, base_work

ROWS: Final = (1, 2, 4, 8, 16, 32, 64)
CONTEXT: Final = 512
TARGET: Final = 1.3  # times the bound, at 32 rows
_EACH_S: Final = 4.0
_WAITS: Final = "waits of the host for the GPU in a decode step (1: its tokens are read)"


def decode(ground: Ground) -> Found:
    """One row of the table for each number of rows of the step."""
    shape = decoder(is_quick=ground.is_quick)
    base, rates = ground.bases.get(shape), ceilings(ground)
    loads = [
        Load(num_rows=n, context=16 if ground.is_quick else CONTEXT) for n in (ROWS[:2] if ground.is_quick else ROWS)
    ]
    steps = Steps(base, loads)
    rows: list[tuple[Value, ...]] = []
    for load in loads:
        if ground.left_s < _EACH_S and rows:
            break
        decoding, work = steps.decoding(load), base_work(base, load)
        took = in_turns(ground, {"": partial(steps.run, decoding)}, most_s=_EACH_S)[""]
        bound_s = work.bound_s(rates)
        rows.append(
            (
                *(load.num_rows, load.context, work.num_bytes / 1e9, work.num_flops / 1e9),
                *(1e3 * bound_s, 1e3 * took.median_s, took.words, took.count),
                *(took.median_s / bound_s, load.num_rows / took.median_s),
            )
        )
    note = f"a step ends when its tokens are on the host; the target at 32 rows is {TARGET:g} times the bound"
    columns = ("rows", "context", "GB", "Gflop", "bound ms", "step ms", "spread", "steps", "over bound", "tokens/s")
    title = f"A decode step of the base alone, {shape.name}"
    facts = ((_WAITS, waits(ground, partial(steps.run, steps.decoding(loads[-1])))),) if ground.is_gpu else ()
    return Found(
        facts=facts,
        figures=(Figures(title=title, columns=columns, rows=tuple(rows), notes=(ground.bases.runs_by, note)),),
    )


def waits(ground: Ground, act: Act) -> int:
    """How often the host waits for the GPU while it does this, as torch tells."""
    ground.settle()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            act()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(one.message) for one in told)
