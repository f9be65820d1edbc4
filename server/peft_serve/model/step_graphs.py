"""Decode steps that are captured once and replayed: by size, and by what the adapters of a step do.

A graph is captured for the acts of the adapters it saw: which terms act at which sites. It serves every mix of adapters
that do no more than that, whoever they are, since all it reads of them is in tables by slot; a site where nobody acts
in a step costs a launch that ends at once. So a thousand adapters of one recipe share a graph, and a graph of two
recipes serves each of them. A graph with parts that are computed for an adapter by itself serves this adapter, with or
without others, until it leaves (`step_acts`). What cannot be captured is remembered with its reason and runs call by
call.

Owns the graphs, the memory they read, and the choice of which stay. How a pass is recorded is given (`Recorder`).

Shapes: `N` rows of a size, `V` vocabulary.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch
from torch import Tensor

from peft_serve.adapters.shortage import is_short_of_memory
from peft_serve.core import BASE_SLOT, Row
from peft_serve.kernels.capture import HeldTables, NotCapturable
from peft_serve.kernels.triton.attention_tiles import power_of_two
from peft_serve.model.base import ResidentBase
from peft_serve.model.families.family import ReadsStates
from peft_serve.model.passes import InFront, NothingInFront
from peft_serve.model.static_route import MOST_PERSONAL, TOO_MANY_PERSONAL, PersonalSlots, StaticRoute
from peft_serve.model.step_acts import Acts, Kind, StepActs
from peft_serve.model.step_memory import Pools, Size, StepMemory, acting_slots, begun_blocks, segments_of, size_for
from peft_serve.model.triton_attention import PlanAttention

_REST: Final = 2000  # steps without a new graph after memory ran out
_MOST_REMEMBERED: Final = 1000
_FEWEST_SLOTS: Final = 8

_log = logging.getLogger(__name__)


class Replay(Protocol):
    """A recorded pass."""

    @property
    def num_bytes(self) -> int:
        """Of the device's memory, as far as it can be told."""
        ...

    def replay(self) -> None:
        """Ask the device for all of it again."""
        ...


class Recorder(Protocol):
    """Who records passes."""

    def record(self, act: Callable[[], None]) -> Replay:
        """`act` is run a few times as it is, and then recorded without being run. Raises whatever it raises, and then
        nothing is left of the attempt."""
        ...


def _nobody(_outcome: str) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capturing:
    """How decode steps are captured. `told` hears what became of each of them: replayed, captured or eager."""

    recorder: Recorder
    attention: PlanAttention
    tables: HeldTables
    max_rows: int
    told: Callable[[str], None] = _nobody
    seen: int = 3  # steps of a size and of acts, until they are worth a graph
    rest: int = 64  # decode steps between two graphs with parts of single adapters: who is there changes all the time
    max_graphs: int = 48
    max_bytes: int = 2 << 30


@dataclass(slots=True)
class _Graph:
    """A recorded pass, and what must not have moved since. `routes` keep the tables alive that it reads, and what was
    made for it alone. What adapters brought is theirs: it is not to be replayed once one of its own has left."""

    replay: Replay
    memory: StepMemory
    num_slots: int
    num_moves: int
    generation: int
    routes: list[StaticRoute] = field(default_factory=list)

    def serves(self, slots: frozenset[int], num_moves: int, generation: int) -> bool:
        """Whether it reads what holds now, for adapters in these slots. Without routes it reads nothing of adapters."""
        if not self.routes:
            return True
        if num_moves != self.num_moves or max(slots, default=0) >= self.num_slots:
            return False
        if generation != self.generation:
            if not all(route.is_current for route in self.routes):
                return False
            self.generation = generation
        return True


_Key = tuple[Size, Acts]


class StepGraphs:
    """See the module. One thread at a time."""

    def __init__(
        self, base: ResidentBase, pools: Pools, capturing: Capturing, *, settle: Callable[[], None] = lambda: None
    ) -> None:
        """`settle` has the device wait for adapters that are on their way to it: a captured step reads all of them."""
        self._base, self._pools = base, pools
        self._settle = settle
        self._capturing = capturing
        self._graphs: OrderedDict[_Key, _Graph] = OrderedDict()  # the longest unused first
        self._memories: dict[Size, StepMemory] = {}
        self._seen: Counter[_Key] = Counter()
        self._refused: dict[frozenset[Kind], str] = {}
        self._told_of: set[frozenset[Kind]] = set()
        self._acts = StepActs(base.adapted)
        self._num_rest = 0  # steps in which nothing is captured
        self._num_personal_rest = 0  # the same, of what has parts of single adapters
        self._logits_NV: Tensor | None = None  # of every graph: one runs at a time, and its rows are read before

    def __len__(self) -> int:
        return len(self._graphs)

    def logits(self, rows: Sequence[Row], in_front: InFront) -> Tensor | None:
        """Float32 logits [rows, V] behind each row's token, valid until the next step; None where the step is none
        that decodes, or has no graph: nothing has been computed then. Raises as a pass does."""
        if not self._is_decode(rows):
            return None
        self._num_rest = max(0, self._num_rest - 1)
        self._num_personal_rest = max(0, self._num_personal_rest - 1)
        graph, is_new = self._found(rows, in_front)
        self._capturing.told("eager" if graph is None else "captured" if is_new else "replayed")
        if graph is None:
            return None
        if not is_new:
            graph.memory.fill(rows, in_front)
            self._settle()
        self._pools.own.clear(begun_blocks(rows, self._pools.own.block_size))
        graph.replay.replay()
        assert self._logits_NV is not None, "a pass was recorded"
        return self._logits_NV[: len(rows)]

    @torch.inference_mode()
    def warm_up(self, *, until: Callable[[], bool] = lambda: False) -> str | None:
        """Capture steps of the base alone, the largest first, `until` it is true; why not, where none can be."""
        sources = (0,) if self._pools.cross is None else (1,)
        sizes = [
            Size(num_rows=num_rows, parts=parts, cross_parts=cross)
            for parts in (1, 4)
            for cross in sources
            for num_rows in reversed(_row_counts(self._capturing.max_rows))
        ]
        for size in sizes:
            if until():
                break
            if self._captured(size, (), NothingInFront()) is None:
                return self._refused.get(Acts().kinds, "memory ran out")
        return None

    def drop(self) -> None:
        """Give the memory back; for some time nothing is captured, for there was none to be had."""
        self._graphs.clear()
        self._memories.clear()
        self._seen.clear()
        self._num_rest = _REST

    def let_go(self) -> None:
        """Drop the graphs with parts of adapters that have left: what was made for these is in memory no longer."""
        for key in [key for key in self._graphs if not self._acts.are_there(key[1])]:
            del self._graphs[key]

    def _is_decode(self, rows: Sequence[Row]) -> bool:
        return 0 < len(rows) <= power_of_two(self._capturing.max_rows) and all(
            len(row.tokens) == 1
            and not row.source
            and row.reading is None
            and (self._pools.cross is None or row.num_source > 0)
            for row in rows
        )

    def _found(self, rows: Sequence[Row], in_front: InFront) -> tuple[_Graph | None, bool]:
        """A graph for these rows, and whether it was captured just now, for their very step."""
        slots = acting_slots(rows)
        if not self._capturing.tables.fits(segments_of(slots)):
            return None, False
        own = frozenset(slots) - {BASE_SLOT}
        if any(self._asks_where(slot, row) for slot, row in zip(slots, rows, strict=True)):
            return None, False
        acts = self._acts.of(own)
        if len(acts.personal) > MOST_PERSONAL:
            self._tell(acts, TOO_MANY_PERSONAL)
            return None, False
        size = size_for(rows, self._pools, self._capturing.attention)
        graph = self._kept(size, acts, own)
        if graph is not None:
            return graph, False
        key = size, acts
        self._seen[key] += 1
        if len(self._seen) > _MOST_REMEMBERED:
            self._seen.clear()
        if (
            self._num_rest
            or (acts.personal and self._num_personal_rest)
            or acts.kinds in self._refused
            or self._seen[key] < self._capturing.seen
        ):
            return None, False
        return self._captured(size, rows, in_front), True

    def _asks_where(self, slot: int, row: Row) -> bool:
        """Whether what acts on a row's token depends on where in its prompt it stands."""
        in_prompt = row.start < row.prompt[1]
        return in_prompt and slot != BASE_SLOT and self._base.adapted.installed(slot).has_extents

    def _kept(self, size: Size, acts: Acts, slots: frozenset[int]) -> _Graph | None:
        """The graph of these acts, or else one that serves them too; those of the base alone are its own."""
        num_moves, generation = self._capturing.tables.num_moves, self._base.adapted.generation
        keys = [(size, acts)]
        others = (key for key in self._graphs if key[0] == size and key[1] != acts and acts.are_within(key[1]))
        keys += sorted(others, key=lambda key: (len(key[1].personal), len(key[1].kinds)))
        for key in keys:
            graph = self._graphs.get(key)
            is_there = self._acts.are_there(key[1])
            if graph is not None and is_there and graph.serves(slots, num_moves, generation):
                self._graphs.move_to_end(key)
                return graph
            self._graphs.pop(key, None)  # it reads what is gone
        return None

    def _captured(self, size: Size, rows: Sequence[Row], in_front: InFront) -> _Graph | None:
        """A new graph for a step's size and acts, made from that step; None where it cannot be had."""
        slots = frozenset(acting_slots(rows)) - {BASE_SLOT}
        personal = PersonalSlots()
        try:
            graph = self._recorded(size, rows, in_front, slots, personal)
        except Exception as error:  # noqa: BLE001  # whatever it is, the step runs without a graph
            if is_short_of_memory(error):
                self.drop()
                return None
            reason = str(error) if isinstance(error, NotCapturable) else f"{type(error).__name__}: {error}"
            self._refuse(slots, personal, reason)
            return None
        self._learn(personal)
        if personal.slots:
            self._num_personal_rest = self._capturing.rest
        self._graphs[size, self._acts.of(slots)] = graph
        self._make_room()
        return graph

    def _refuse(self, slots: frozenset[int], personal: PersonalSlots, reason: str) -> None:
        """A step of these adapters cannot be captured, and so none of their kinds; or there are too many with parts of
        their own, where fewer of them can."""
        self._learn(personal)
        acts = self._acts.of(slots)
        if len(acts.personal) <= MOST_PERSONAL:
            if len(self._refused) >= _MOST_REMEMBERED:
                self._refused.clear()
            self._refused[acts.kinds] = reason
        self._tell(acts, reason)

    def _learn(self, personal: PersonalSlots) -> None:
        """Who has parts of their own. Graphs are of no use any more once it is forgotten whose."""
        if self._acts.num_learnt >= _MOST_REMEMBERED:
            self._acts.forget()
            self._graphs.clear()
        self._acts.learn(personal.slots)

    def _tell(self, acts: Acts, reason: str) -> None:
        """Once for each mix of kinds."""
        if acts.kinds not in self._told_of:
            if len(self._told_of) >= _MOST_REMEMBERED:
                self._told_of.clear()
            self._told_of.add(acts.kinds)
            _log.info("decode steps of %d kinds of adapters run without CUDA graphs: %s", len(acts.kinds), reason)

    def _recorded(
        self, size: Size, rows: Sequence[Row], in_front: InFront, slots: frozenset[int], personal: PersonalSlots
    ) -> _Graph:
        adapted, tables = self._base.adapted, self._capturing.tables
        memory = self._memories.get(size)
        if memory is None:
            memory = StepMemory(size, self._pools, self._capturing.attention, tables.held(size.num_rows))
            self._memories[size] = memory
        memory.fill(rows, in_front)
        self._settle()
        num_slots, routes = max(_FEWEST_SLOTS, power_of_two(adapted.num_slots)), list[StaticRoute]()

        def route_of(active: frozenset[int]) -> StaticRoute:
            routes.append(StaticRoute(active, memory.slots_N, memory.segments, personal, num_slots=num_slots))
            return routes[-1]

        with adapted.captured(slots, route_of):
            replay = self._capturing.recorder.record(lambda: self._pass(memory))
        return _Graph(
            replay=replay,
            memory=memory,
            num_slots=num_slots,
            num_moves=tables.num_moves,
            generation=adapted.generation,
            routes=routes,
        )

    def _pass(self, memory: StepMemory) -> None:
        """What is recorded: the decoder over the rows of the memory, and their logits where all graphs put them."""
        family = self._base.runs
        with family.attention.running(memory.works):
            logits_NV = family.logits(memory.tokens_N, memory.positions_N, memory.keep_N, None)
        if isinstance(family, ReadsStates):
            family.states()  # nobody reads them, and they would keep memory
        if self._logits_NV is None:
            num_rows = power_of_two(self._capturing.max_rows)
            self._logits_NV = logits_NV.new_empty((num_rows, logits_NV.shape[1]), dtype=torch.float32)
        self._logits_NV[: len(logits_NV)].copy_(logits_NV)

    def _make_room(self) -> None:
        while len(self._graphs) > self._capturing.max_graphs or (
            len(self._graphs) > 1
            and sum(graph.replay.num_bytes for graph in self._graphs.values()) > self._capturing.max_bytes
        ):
            self._graphs.popitem(last=False)


def _row_counts(max_rows: int) -> list[int]:
    """1, 2, 4, and so on."""
    return [1 << i for i in range((max_rows - 1).bit_length() + 1)]
