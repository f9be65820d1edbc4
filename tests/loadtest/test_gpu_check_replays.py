"""Benchmarks of the check run decode steps as a server does: from graphs, where there are any. A tape stands in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from loadtest.gpu.ground import Bases, Ground
from loadtest.gpu.kernels import kernels_for
from loadtest.gpu.many_bench import host_cache
from loadtest.gpu.parts import named
from loadtest.gpu.results import Figures
from loadtest.gpu.serving import NO_GRAPHS, Outcomes
from loadtest.gpu.shapes import decoder
from loadtest.gpu.traffic import ClosedLoop, Lengths, forever, serving_for
from peft_serve.engine.gpu_graphs import capturing_by
from peft_serve.model.step_graphs import Capturing
from tests.kernels.triton.interpreter import IS_INTERPRETED
from tests.model.slow_tiles import SlowTiles
from tests.model.tape import TapeRecorder

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(not IS_INTERPRETED, reason="the tiny models are on a CPU"),
    pytest.mark.filterwarnings("ignore"),  # peft uses names that transformers is about to drop
]


def ground() -> Ground:
    return Ground(device=torch.device("cpu"), is_quick=True)


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> TapeRecorder:
    """Bases whose steps can be captured, though they are on a CPU."""
    recorder = TapeRecorder()

    def capturing(bases: Bases, *, max_rows: int, told: Callable[[str], None] = lambda _: None) -> Capturing:
        assert bases._kept is not None
        base, kernels = bases._kept[1], kernels_for(ground())
        kernels = replace(kernels, attention=SlowTiles(kernels.attention.sizes))
        base.adapted.run_low_rank_by(kernels.low_rank)
        return capturing_by(recorder, base, kernels, max_rows=max_rows, max_rank=16, told=told)

    monkeypatch.setattr(Bases, "capturing", capturing)
    return recorder


def figures(name: str) -> tuple[Figures, ...]:
    (part,) = named([name])
    found: Any = part.function()(ground())
    return found.figures


def column(figures: Figures, name: str) -> list[Any]:
    return [row[figures.columns.index(name)] for row in figures.rows]


def test_a_loop_replays_its_decode_steps_and_its_runner_keeps_the_graphs(taped: TapeRecorder) -> None:
    here = ground()
    base = here.bases.get(decoder(is_quick=True))
    adapters = {adapter.id: adapter for adapter in host_cache(base, 2, rank=4)}
    lengths = Lengths(prompt=6, answer=8)
    served = serving_for(here, base, adapters.__getitem__, num_rows=2, lengths=lengths)
    assert served.has_graphs
    assert "captured in CUDA graphs" in served.how
    counts: list[int] = []
    for _ in range(2):
        loop = ClosedLoop(here, served, num_rows=2, num_slots=2, lengths=lengths)
        found = loop.run(forever(list(adapters), [0, 1]), most_s=0.0, fewest_steps=6)
        loop.close()
        assert 0 < found.num_replayed < found.num_steps, "where a prompt joins, a step is none that decodes"
        assert found.replayed == found.num_replayed / found.num_steps
        counts.append(len(taped.replays))
    assert counts[0] == counts[1]


def test_load_is_told_by_rho_and_number_of_adapters() -> None:
    _, load = figures("load")
    rhos, counts, over = (column(load, name) for name in ("rho", "adapters", "thr(n)/thr(0)"))
    assert set(zip(rhos, counts, strict=True)) == {(rho, n) for rho in (0.5, 0.9, 1.2) for n in (0, 6)}
    assert [one for n, one in zip(counts, over, strict=True) if n == 0] == [1.0] * 3


def test_steps_by_popularity_are_replayed(taped: TapeRecorder) -> None:
    (found,) = figures("popularity")
    assert "0 replayed" not in found.notes[-1]
    assert " 0 launched call by call" in found.notes[-1]
    assert all(over > 0 for over in column(found, "over bound"))
    assert len(taped.replays) == 2  # of the base alone, and of any mix


def test_without_graphs_it_is_said() -> None:
    (found,) = figures("many adapters")
    assert column(found, "replayed") == [None] * len(found.rows)
    assert found.notes[-1] == NO_GRAPHS
    assert Outcomes().words() == NO_GRAPHS
