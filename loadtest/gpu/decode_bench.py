"""A decode step of the base alone, 1 to 64 rows, in full, replayed and in 8 bits, against what this machine could do.

The least a step can take is its bytes (weights, and keys and values of its context, read once) over the bandwidth that
was measured in this call, or its arithmetic over the rate of a matrix product, whichever is longer.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Final

import torch

from loadtest.gpu.facts import ceilings
from loadtest.gpu.ground import Ground
from loadtest.gpu.results import Figures, Found, Value
from loadtest.gpu.rows import Steps
from loadtest.gpu.shapes import decoder, quantised
from loadtest.gpu.timing import Act, Spread, in_turns
from loadtest.work import Load, base_work
from peft_serve.core import Row, StepResult
from peft_serve.kernels.eight_bits import Code
from peft_serve.model.attention import PlanKernel
from peft_serve.model.base import ResidentBase

ROWS: Final = (1, 2, 4, 8, 16, 32, 64)
FEW_ROWS: Final = (1, 32)  # of a base in 8 bits
CONTEXT: Final = 512
TARGET: Final = 1.3  # times the bound, at 32 rows
_EACH_S: Final = 4.0
_LOADING_S: Final = 6.0  # what a base of 8 B is made in
_COLUMNS: Final = ("rows", "context", "GB", "Gflop", "bound ms", "step ms", "spread", "steps", "over bound", "tokens/s")
_MORE_COLUMNS: Final = ("with graphs ms", "spread with", "over bound with")
_GRAPH_WAITS: Final = "the same, replayed from a CUDA graph"
_WAITS: Final = "waits of the host for the GPU in a decode step (1: its tokens are read)"


class Replayed:
    """Steps in CUDA graphs. They have our own attention; the base has what it had when none of them runs."""

    def __init__(self, base: ResidentBase, steps: Steps, ours: PlanKernel | None) -> None:
        self._attention, self._steps, self._ours = base.runs.attention, steps, ours

    def run(self, rows: Sequence[Row]) -> StepResult:
        """One step."""
        was, self._attention.whole = self._attention.whole, self._ours
        try:
            return self._steps.run(rows)
        finally:
            self._attention.whole = was


def replayed(ground: Ground, base: ResidentBase, loads: Sequence[Load]) -> Replayed | None:
    """Steps in CUDA graphs, where the base can have them."""
    was = base.runs.attention.whole
    capturing = ground.bases.capturing_at_once(max_rows=max(load.num_rows for load in loads))
    ours, base.runs.attention.whole = base.runs.attention.whole, was
    return None if capturing is None else Replayed(base, Steps(base, loads, capturing=capturing), ours)


def decode(ground: Ground) -> Found:
    """One row of the table for each number of rows of the step."""
    shape = decoder(is_quick=ground.is_quick)
    base = ground.bases.get(shape)
    loads = _loads(ground, ROWS)
    steps, graphed = Steps(base, loads), replayed(ground, base, loads)
    rows = _measured(ground, base, steps, loads, graphed)
    note = f"a step ends when its tokens are on the host; the target at 32 rows is {TARGET:g} times the bound"
    title = f"A decode step of the base alone, {shape.name}"
    decoding = steps.decoding(loads[-1])
    facts = [(_WAITS, waits(ground, partial(steps.run, decoding)))] if ground.is_gpu else []
    if graphed is not None:
        facts.append((_GRAPH_WAITS, waits(ground, partial(graphed.run, decoding))))
    columns = _COLUMNS if graphed is None else (*_COLUMNS, *_MORE_COLUMNS)
    return Found(
        facts=tuple(facts),
        figures=(Figures(title=title, columns=columns, rows=rows, notes=(ground.bases.runs_by, note)),),
    )


def eight_bits(ground: Ground) -> Found:
    """The same for the base in 8 bits, whose bound is that of the bytes it has: a table for each kind."""
    figures: list[Figures] = []
    for code in Code:
        if figures and ground.left_s < _LOADING_S + _EACH_S:
            return Found(figures=tuple(figures), left_out=(f"{code}: no time was left",))
        shape = quantised(decoder(is_quick=ground.is_quick), code)
        base, loads = ground.bases.get(shape), _loads(ground, FEW_ROWS)
        rows = _measured(ground, base, Steps(base, loads), loads)
        title = f"A decode step of the base alone, {shape.name}"
        figures.append(Figures(title=title, columns=_COLUMNS, rows=rows, notes=(ground.bases.runs_by,)))
    ground.bases.drop()
    return Found(figures=tuple(figures))


def _loads(ground: Ground, rows: tuple[int, ...]) -> list[Load]:
    return [
        Load(num_rows=n, context=16 if ground.is_quick else CONTEXT) for n in (rows[:2] if ground.is_quick else rows)
    ]


def _measured(
    ground: Ground, base: ResidentBase, steps: Steps, loads: list[Load], graphed: Replayed | None = None
) -> tuple[tuple[Value, ...], ...]:
    rates, rows = ceilings(ground), list[tuple[Value, ...]]()
    for load in loads:
        if ground.left_s < _EACH_S and rows:
            break
        decoding, work = steps.decoding(load), base_work(base, load)
        acts: dict[str, Act] = {"": partial(steps.run, decoding)}
        if graphed is not None:
            acts["graphs"] = partial(graphed.run, decoding)
        times = in_turns(ground, acts, most_s=_EACH_S)
        took, bound_s = times[""], work.bound_s(rates)
        rows.append(
            (
                *(load.num_rows, load.context, work.num_bytes / 1e9, work.num_flops / 1e9),
                *(1e3 * bound_s, 1e3 * took.median_s, took.words, took.count),
                *(took.median_s / bound_s, load.num_rows / took.median_s),
                *(_beside(times["graphs"], bound_s) if graphed is not None else ()),
            )
        )
    return tuple(rows)


def _beside(took: Spread, bound_s: float) -> tuple[Value, ...]:
    return 1e3 * took.median_s, took.words, took.median_s / bound_s


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
