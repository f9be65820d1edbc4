"""The time of a step with adapters of one kind, in turns with the same rows of the base (W11)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loadtest.bound import Work
from loadtest.kinds import KINDS, is_empty
from loadtest.steps import StepBench
from loadtest.work import Load, adapters_work, base_work, bytes_of
from peft_serve.core import BASE_SLOT


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One point: a kind of adapter, the rows of the step, so many distinct ones, and the times."""

    term: str
    load: Load
    num_adapters: int
    step_s: float
    base_s: float  # the same rows without adapters, in turns with it
    base_work: Work
    term_work: Work


def time_term(
    bench: StepBench, term: str, repeats: Mapping[Load, int], counts: Sequence[int], *, max_bytes: int
) -> Iterator[Timed]:
    """One point for each number of distinct adapters and each load that has rows for them, each step run so many
    times; from the first number on whose adapters take more than `max_bytes`, none, and none on a base that has no
    place for the term. In a mixture the base counts as one of them."""
    for count in counts:
        made = {slot: KINDS[term](bench.base, slot) for slot in range(1, count + 1)}
        adapters = {slot: adapter for slot, adapter in made.items() if adapter is not None}
        if any(is_empty(adapter) for adapter in adapters.values()) or bytes_of(adapters) > max_bytes:
            return
        with bench.holding(adapters):
            for load, times in repeats.items():
                if count > load.num_rows:
                    continue
                slots = [
                    slot if slot in adapters else BASE_SLOT for slot in (1 + r % count for r in range(load.num_rows))
                ]
                step_s, base_s = bench.beside_base_s(load, slots, repeats=times)
                yield Timed(
                    term=term,
                    load=load,
                    num_adapters=count,
                    step_s=step_s,
                    base_s=base_s,
                    base_work=base_work(bench.base, load),
                    term_work=adapters_work(bench.base, adapters, load, among=count),
                )
