"""Runners as a server makes them: decode steps are captured in CUDA graphs where they can be, those of the base alone
before anybody asks. How steps were run is counted, for tables to tell beside what they took.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from loadtest.gpu.ground import Ground
from loadtest.gpu.rows import BLOCK_SIZE
from peft_serve.adapters.primitives import Adapter
from peft_serve.core import AdapterId
from peft_serve.engine.gpu_graphs import warm_up
from peft_serve.model.base import ResidentBase
from peft_serve.model.runner import StepRunner

NO_GRAPHS: Final = "decode steps are launched call by call: no CUDA graphs here"


class Outcomes:
    """How decode steps were run: replayed from a graph, captured in one just then, or launched call by call."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def note(self, outcome: str) -> None:
        """One step more."""
        self._counts[outcome] += 1

    @property
    def num_replayed(self) -> int:
        """Steps that were one call."""
        return self._counts["replayed"]

    def words(self) -> str:
        """All of them, as a table's note."""
        told = ", ".join(f"{self._counts[name]} {word}" for name, word in _WORDS.items())
        return f"decode steps, with those that warmed up: {told}" if self._counts else NO_GRAPHS


_WORDS: Final = {"replayed": "replayed from a CUDA graph", "captured": "captured", "eager": "launched call by call"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A runner over a base, for loops one after the other; `how` says whether it has graphs, in words."""

    base: ResidentBase
    runner: StepRunner
    adapters: Callable[[AdapterId], Adapter]
    outcomes: Outcomes
    how: str

    @property
    def has_graphs(self) -> bool:
        """Whether decode steps may be replayed."""
        return self.runner.graphs is not None


def serving(
    ground: Ground, base: ResidentBase, adapters: Callable[[AdapterId], Adapter], *, num_rows: int, num_blocks: int
) -> Serving:
    """For steps of so many rows at most, on the base that is there; `num_blocks` with the padding block."""
    outcomes, said = Outcomes(), list[str]()
    runner = StepRunner(
        base,
        num_blocks=num_blocks,
        num_cross_blocks=0,
        block_size=BLOCK_SIZE,
        adapters=adapters,
        capturing=ground.bases.capturing(max_rows=num_rows, told=outcomes.note),
    )
    warm_up("auto", runner, said.append, clock=ground.clock)
    return Serving(base=base, runner=runner, adapters=adapters, outcomes=outcomes, how="; ".join(said) or NO_GRAPHS)
