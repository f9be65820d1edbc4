"""Does throughput hold as traffic spreads over more and more adapters? The real scheduler in a closed loop.

All adapters are in the host's memory and have slots for a few; the rest is copied in when a request asks for it. Which
one it asks for follows a power law, as in S-LoRA's traces (arXiv:2311.03285). Loops are played there and back.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from loadtest.gpu.ground import Ground
from loadtest.gpu.random_adapters import lora, on_host, renamed
from loadtest.gpu.results import Figures, Found, Value
from loadtest.gpu.serving import Serving
from loadtest.gpu.shapes import decoder
from loadtest.gpu.traffic import ClosedLoop, Lengths, Served, forever, serving_for
from loadtest.popularity import parse_popularity
from peft_serve.adapters.primitives import Adapter
from peft_serve.model.base import ResidentBase

COUNTS: Final = (0, 1, 5, 200, 2000)
RANK: Final = 16
NUM_ROWS: Final = 32
NUM_SLOTS: Final = 64
LENGTHS: Final = Lengths(prompt=64, answer=64)
TARGETS: Final = {1: 0.97, 200: 0.93}
FEW: Final = 5  # adapters that the most are held against:
TARGET_OF_MOST: Final = 0.98  # times their throughput
_OWN: Final = 8  # adapters with numbers of their own; the others are these under other names
_POPULARITY: Final = "slora:0.3"


def many(ground: Ground) -> Found:
    """thr(n) / thr(0), and thr(n) / thr(5)."""
    quick = ground.is_quick
    base = ground.bases.get(decoder(is_quick=quick))
    counts = (0, 1, 5, 6) if quick else COUNTS
    adapters = host_cache(base, max(counts), rank=4 if quick else RANK)
    by_id = {adapter.id: adapter for adapter in adapters}
    found: dict[int, list[Served]] = {n: [] for n in counts}
    num_rows, lengths = (4, Lengths(prompt=6, answer=8)) if quick else (NUM_ROWS, LENGTHS)
    served = serving_for(ground, base, by_id.__getitem__, num_rows=num_rows, lengths=lengths)
    each_s = 0.0 if quick else max(1.0, (ground.left_s - 5) / (3 * len(counts)))
    for n in (*counts, *reversed(counts)):
        loop = ClosedLoop(ground, served, num_rows=num_rows, num_slots=5 if quick else NUM_SLOTS, lengths=lengths)
        found[n].append(loop.run(forever([one.id for one in adapters[:n]], asked(n)), most_s=each_s))
        loop.close()
        if ground.left_s < each_s and found[counts[-1]]:
            break
    return Found(figures=(_figures(found, served),))


def host_cache(base: ResidentBase, count: int, *, rank: int) -> list[Adapter]:
    """So many adapters in the host's memory, looked over as the loading threads of a server do it."""
    own = [on_host(lora(base, f"host-{i}", rank, seed=i, attention_only=True)) for i in range(min(count, _OWN))]
    adapters = [renamed(own[i % len(own)], f"many-{i}") for i in range(count)]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as threads:
        list(threads.map(base.adapted.vet, adapters))
    return adapters


def asked(n: int) -> list[int]:
    """Adapter numbers of the requests, in their order."""
    if not n:
        return []
    numbers = parse_popularity(_POPULARITY).choose(np.zeros(4096), n, np.random.default_rng(1))
    return [int(number) for number in numbers]


def _figures(found: dict[int, list[Served]], served: Serving) -> Figures:
    speeds = {n: sum(one.tokens_per_s for one in passes) / len(passes) for n, passes in found.items() if passes}
    rows: list[tuple[Value, ...]] = []
    for n, passes in found.items():
        if n in speeds:
            steps = sum(one.num_steps for one in passes)
            installs = sum(one.num_installs for one in passes) / max(1, steps)
            target = TARGETS.get(n)
            over_few = speeds[n] / speeds[FEW] if n > FEW and FEW in speeds else None
            of_most = TARGET_OF_MOST if n == max(COUNTS) else None
            told = (n, speeds[n], speeds[n] / speeds[0], target, over_few, of_most)
            replayed = sum(one.num_replayed for one in passes) / max(1, steps) if served.has_graphs else None
            rows.append((*told, 1e3 * _step_s(passes), installs, steps, replayed))
    return Figures(
        title=f"Throughput over n adapters registered, {served.base.name}",
        columns=(
            *("adapters", "tokens/s", "thr(n)/thr(0)", "target", f"thr(n)/thr({FEW})", "target"),
            *("step ms", "installs a step", "steps", "replayed"),
        ),
        rows=tuple(rows),
        notes=(
            f"closed loop, {NUM_ROWS} requests, {_POPULARITY}, rank {RANK} at attention, {NUM_SLOTS} slots",
            served.how,
        ),
    )


def _step_s(passes: list[Served]) -> float:
    return sum(one.seconds for one in passes) / max(1, sum(one.num_steps for one in passes))
