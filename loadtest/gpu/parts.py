"""The parts of a check in their order: first what the machine is, then what is right, then how fast it is.

Each names its function, which is imported by the process that runs it, and its share of the time: it is told how much
it has, and leaves out what does not fit; one that goes far beyond is ended from outside. What a part does not use, the
parts behind it have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

from loadtest.gpu.results import Group

_KERNELS: Final = ("triton",)
GROUPS: Final = ("correctness", "kernels", "bench")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One section to be. `where` is module:function, `weight` its share of the time beside the others', in seconds of a
    whole run; `needs` are packages it cannot do without."""

    name: str
    group: Group
    where: str
    weight: float
    needs: tuple[str, ...] = ()
    is_for_gpu: bool = False  # on a CPU there is nothing that it could show

    def function(self) -> Any:
        """What runs it: Ground -> Found."""
        module, _, name = self.where.partition(":")
        return getattr(import_module(module), name)

    def lacks(self) -> tuple[str, ...]:
        """Packages that it needs and this machine has not."""
        return tuple(name for name in self.needs if find_spec(name) is None)


ALL: Final = (
    Part(name="machine", group="facts", where="loadtest.gpu.facts:facts", weight=15),
    Part(
        name="attention",
        group="correctness",
        where="loadtest.gpu.attention_checks:attention",
        weight=60,
        needs=_KERNELS,
    ),
    Part(
        name="low-rank", group="correctness", where="loadtest.gpu.low_rank_checks:low_rank", weight=20, needs=_KERNELS
    ),
    Part(
        name="graphs",
        group="correctness",
        where="loadtest.gpu.graph_checks:graphs",
        weight=10,
        is_for_gpu=True,
        needs=_KERNELS,
    ),
    Part(
        name="decode graphs",
        group="correctness",
        where="loadtest.gpu.step_graph_checks:step_graphs",
        weight=15,
        needs=_KERNELS,
    ),
    Part(name="telling", group="correctness", where="loadtest.gpu.telling_checks:telling", weight=8),
    Part(name="memory", group="correctness", where="loadtest.gpu.memory_checks:memory", weight=10, is_for_gpu=True),
    Part(name="one budget", group="correctness", where="loadtest.gpu.arena_checks:one_budget", weight=10),
    Part(name="terms", group="correctness", where="loadtest.gpu.term_checks:terms", weight=15),
    Part(name="models", group="correctness", where="loadtest.gpu.model_checks:models", weight=55),
    Part(name="bfloat16", group="correctness", where="loadtest.gpu.model_checks:bfloat16", weight=25),
    Part(name="encoders", group="correctness", where="loadtest.gpu.model_checks:encoders", weight=12),
    Part(name="methods", group="correctness", where="loadtest.gpu.method_checks:methods", weight=55, needs=("peft",)),
    Part(name="eight bits", group="correctness", where="loadtest.gpu.eight_bits_checks:eight_bits", weight=12),
    Part(name="decode", group="bench", where="loadtest.gpu.decode_bench:decode", weight=45),
    Part(name="popularity", group="bench", where="loadtest.gpu.popularity_bench:popularity", weight=45),
    Part(name="many adapters", group="bench", where="loadtest.gpu.many_bench:many", weight=45),
    Part(name="load", group="bench", where="loadtest.gpu.load_bench:load", weight=60),
    Part(name="peft", group="bench", where="loadtest.gpu.peft_bench:peft", weight=60, needs=("peft",)),
    Part(
        name="attention kernel",
        group="kernels",
        where="loadtest.gpu.attention_bench:attention",
        weight=25,
        needs=_KERNELS,
    ),
    Part(
        name="low-rank kernel", group="kernels", where="loadtest.gpu.low_rank_bench:low_rank", weight=35, needs=_KERNELS
    ),
    Part(
        name="other kernels",
        group="kernels",
        where="loadtest.gpu.other_kernels_bench:others",
        weight=15,
        needs=_KERNELS,
    ),
    Part(
        name="compiled prompts",
        group="bench",
        where="loadtest.gpu.compiled_bench:prompts",
        weight=45,
        is_for_gpu=True,
    ),
    Part(name="other shapes", group="bench", where="loadtest.gpu.other_bench:others", weight=20),
    Part(name="decode in 8 bits", group="bench", where="loadtest.gpu.decode_bench:eight_bits", weight=35),
)


def chosen(only: str | None) -> tuple[Part, ...]:
    """Every part, or those of one group; the machine's facts belong to any of them."""
    return tuple(part for part in ALL if only is None or part.group in ("facts", only))


def named(names: Sequence[str]) -> tuple[Part, ...]:
    """The parts of these names, in the order of `ALL`."""
    return tuple(part for part in ALL if part.name in names)


def share_s(parts: Sequence[Part], left_s: float) -> float:
    """Seconds that the first of these parts has, of what is left for all of them."""
    return left_s * parts[0].weight / sum(part.weight for part in parts)
