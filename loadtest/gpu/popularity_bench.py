"""What it costs that the rows of a step use different adapters: Punica's four popularities (arXiv:2310.18547), by rank.

Distinct: every row another adapter; uniform: the square root of as many; skewed: each 1.5 times as often as the next;
identical: all the same. The adapters are in their slots, and steps of all four and of the base alone take turns.
"""

from functools import partial
from typing import Final

import numpy as np

from loadtest.gpu.facts import ceilings
from loadtest.gpu.ground import Ground
from loadtest.gpu.random_adapters import lora
from loadtest.gpu.results import Figures, Found, Value
from loadtest.gpu.rows import Steps
from loadtest.gpu.serving import Outcomes
from loadtest.gpu.shapes import decoder
from loadtest.gpu.timing import Spread, in_turns
from loadtest.popularity import parse_popularity
from loadtest.work import Load, adapters_work, base_work
from peft_serve.adapters.primitives import Adapter
from peft_serve.model.base import ResidentBase

POPULARITIES: Final = ("identical", "skewed", "uniform", "distinct")
RANKS: Final = (16, 8, 64)  # the one that is promised something first
NUM_ROWS: Final = 32
CONTEXT: Final = 512
TARGET: Final = 1.05  # Distinct at rank 16: times what its bytes allow
_EACH_S: Final = 12.0
_NEEDS_S: Final = 8.0


def popularity(ground: Ground) -> Found:
    """One row of the table for each rank and popularity."""
    shape = decoder(is_quick=ground.is_quick)
    base = ground.bases.get(shape)
    load = Load(num_rows=4 if ground.is_quick else NUM_ROWS, context=16 if ground.is_quick else CONTEXT)
    outcomes = Outcomes()
    capturing = ground.bases.capturing_at_once(max_rows=load.num_rows, told=outcomes.note)
    steps = Steps(base, [load], capturing=capturing)
    rows: list[tuple[Value, ...]] = []
    for rank in RANKS[: 1 if ground.is_quick else None]:
        if ground.left_s < _NEEDS_S and rows:
            break
        adapters = {slot: lora(base, f"{rank}-{slot}", rank, seed=slot) for slot in range(1, load.num_rows + 1)}
        rows += _of_rank(ground, base, steps, load, rank, adapters)
    title = f"{load.num_rows} rows by what they ask for, all linear layers adapted, {shape.name}"
    columns = (
        "rank",
        "popularity",
        "adapters",
        "step ms",
        "spread",
        "over base",
        "over identical",
        "bytes allow",
        "over bytes",
        "over bound",
    )
    note = (
        "'bytes allow' is the base's step times the bytes with the adapters over those without; the target is "
        f"distinct at rank 16 at most {TARGET:g} times that; 'over bound' is the step over what its bytes or its "
        "arithmetic take at the rates measured in this call"
    )
    return Found(figures=(Figures(title=title, columns=columns, rows=tuple(rows), notes=(note, outcomes.words())),))


def _of_rank(
    ground: Ground, base: ResidentBase, steps: Steps, load: Load, rank: int, adapters: dict[int, Adapter]
) -> list[tuple[Value, ...]]:
    slots = {name: slots_of(name, load.num_rows) for name in POPULARITIES}
    with steps.holding(adapters):
        decoding = {name: steps.decoding(load, each) for name, each in slots.items()} | {"base": steps.decoding(load)}
        acts = {name: partial(steps.run, rows) for name, rows in decoding.items()}
        took: dict[str, Spread] = in_turns(ground, acts, most_s=_EACH_S)
    alone, own = took["base"].median_s, base_work(base, load)
    rates = ceilings(ground)
    told = (rank, "base alone", 0, 1e3 * alone, took["base"].words, 1.0, None, None, None)
    rows: list[tuple[Value, ...]] = [(*told, alone / own.bound_s(rates))]
    for name in POPULARITIES:
        used = {slot: adapters[slot] for slot in set(slots[name])}
        more = adapters_work(base, used, load)
        allowed = 1 + more.num_bytes / own.num_bytes
        over, same = took[name].median_s / alone, took[name].median_s / took["identical"].median_s
        found = (1e3 * took[name].median_s, took[name].words, over, same, allowed, over / allowed)
        rows.append((rank, name, len(used), *found, took[name].median_s / (own + more).bound_s(rates)))
    return rows


def slots_of(popularity: str, num_rows: int) -> list[int]:
    """The slot of each row, from 1 on."""
    numbers = parse_popularity(popularity).choose(np.zeros(num_rows), num_rows, np.random.default_rng(0))
    return [1 + int(number) for number in numbers]
