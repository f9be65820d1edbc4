"""Routing: whose tokens a step's tokens are.

A `Stream` names a sequence of tokens that sites see; a `Lane` is the one place where the sites of a stream
look up the current `Route`; a `Route` is a frozen division of the stream's tokens among adapters, with the
index tensors that all sites share, computed once. No lane has a route while no token has an adapter.
Where an adapter's rows lie in the stacks is decided by `stacks`, what a site does by `site_ops`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from peft_serve.core import BASE_SLOT
from peft_serve.kernels import grouped
from peft_serve.kernels.grids import Grid, grids_of
from peft_serve.kernels.grouped import Piece
from peft_serve.kernels.low_rank import Segments
from peft_serve.kernels.subsets import Batch, Subset, Tokens, batches_of, subset_of
from peft_serve.model.extents import Extent, Extents
from peft_serve.model.stacks import Place


class Stream(StrEnum):
    """Which tokens a site sees."""

    TARGET = "target"  # the (decoder's) tokens
    SOURCE = "source"  # the encoder's tokens, which cross-attention keys and values read too
    HEAD = "head"  # the positions kept for logits, and the states that heads read
    POSITIONS = "positions"  # relative positions, where a model projects them like tokens (DeBERTa)


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens [first, last) of a stream belong to `slot`."""

    slot: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Personal:
    """Tokens of one adapter, for a part that is computed for it by itself."""

    slot: int
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class Together:
    """Tokens that are computed together, and the runs that they divide into, counted in what is taken of them."""

    tokens: Tokens
    slot_N: Tensor
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class Alike:
    """Runs of one length, and whose they are, in the order of the batch."""

    batch: Batch
    slots: tuple[int, ...]


class Way(StrEnum):
    """How the low-rank terms of a step's adapters are computed."""

    MASKED = "masked"  # two products over all of them, foreign entries blanked
    RUNS = "runs"  # two products for each
    GRIDS = "grids"  # two batched products for each width


class Span:
    """The stack rows [first, last) that a set of adapters uses. The rows of `pieces` count from `first`."""

    def __init__(self, num_tokens: int, runs: Sequence[tuple[Run, Place]], device: torch.device) -> None:
        self.first = min(place.first for _, place in runs)
        self.last = max(place.last for _, place in runs)
        self.pieces: tuple[Piece, ...] = tuple(
            (run.first, run.last, place.first - self.first, place.last - self.first) for run, place in runs
        )
        self._num_tokens = num_tokens
        self._device = device
        self._foreign_TR: Tensor | None = None
        self._ways: dict[int, Way] = {}

    @cached_property
    def grids(self) -> tuple[Grid, ...] | None:
        """The adapters as batched products, where their places allow it."""
        return grids_of(self.pieces, self._device)

    def way(self, features: int) -> Way:
        """The cheapest way for a site with so many in + out features (docs/decisions/0001)."""
        if features not in self._ways:
            costs = {
                Way.MASKED: grouped.cost_masked(self._num_tokens, self.last - self.first, features),
                Way.RUNS: grouped.cost_runs(self.pieces, features),
            }
            if self.grids is not None:
                costs[Way.GRIDS] = sum(grid.cost(features) for grid in self.grids)
            self._ways[features] = min(costs, key=lambda way: costs[way])
        return self._ways[features]

    @property
    def foreign(self) -> Tensor:
        """[T, R] Where row r is not of token t's adapter."""
        if self._foreign_TR is None:
            foreign_TR = torch.ones(self._num_tokens, self.last - self.first, dtype=torch.bool)
            for first, last, first_row, last_row in self.pieces:
                foreign_TR[first:last, first_row:last_row] = False
            self._foreign_TR = foreign_TR.to(self._device)
        return self._foreign_TR


Division = tuple[tuple[int, int], ...]
"""(slot, number of tokens) in the order of the tokens, 0 = base. A slot may come more than once: rows of an adapter
that acts from some token on only have base tokens between them."""
Places = Mapping[int, Place]


def acting_runs(slot: int, num_tokens: int, num_idle: int) -> tuple[tuple[int, int], ...]:
    """The runs of a row's tokens when its adapter does not act on the first `num_idle` of them (below 0: none)."""
    idle = min(max(num_idle, 0), num_tokens)
    if not idle:
        return ((slot, num_tokens),)
    return ((BASE_SLOT, idle), (slot, num_tokens - idle))


def divided(runs: Iterable[tuple[int, int]]) -> Division:
    """Runs without the empty ones, neighbours of one slot joined."""
    joined: list[tuple[int, int]] = []
    for slot, num_tokens in runs:
        if not num_tokens:
            continue
        if joined and joined[-1][0] == slot:
            joined[-1] = (slot, joined[-1][1] + num_tokens)
        else:
            joined.append((slot, num_tokens))
    return tuple(joined)


class Table(Protocol):
    """A vector for each slot, [S, D], in memory that may move as slots come."""

    @property
    def rows(self) -> Tensor: ...


class Truths(Table, Protocol):
    """A word for each slot, [S, 1], that is true for `slots`."""

    slots: set[int]


class Route:
    """How the tokens of a stream are divided among adapters.

    `runs` holds the adapted tokens only, in the order of the tokens. `places` is a copy: a route outlives no
    change of the stacks.
    """

    def __init__(
        self,
        division: Division,
        adapted: Collection[int],
        places: Places,
        device: torch.device,
        extents: tuple[Extent, ...] = (),
        *,
        num_slots: int = 0,
    ) -> None:
        """`num_slots` is one more than the largest slot that holds an adapter, whether it is of this route or not:
        tables by slot reach that far, so that what is told of them holds for other routes too."""
        runs, first = [], 0
        for slot, num_tokens in division:
            if slot in adapted and num_tokens:
                runs.append(Run(slot, first, first + num_tokens))
            first += num_tokens
        self.division = division
        self.num_tokens = first
        self.runs = tuple(runs)
        self.active = frozenset(run.slot for run in runs)
        self.num_slots = max(num_slots, 1 + max(self.active, default=0))
        self.extents = Extents(extents, device)
        self._places = {slot: places[slot] for slot in self.active if slot in places}
        self._device = device
        self._slot_T: Tensor | None = None
        self._spans: dict[frozenset[int], Span] = {}
        self._subsets: dict[frozenset[int], Subset] = {}
        self._slots: dict[frozenset[int], Tensor] = {}
        self._batches: dict[frozenset[int], tuple[Alike, ...]] = {}

    @property
    def device(self) -> torch.device:
        return self._device

    def holds(self, places: Places) -> bool:
        """Whether these are the places the route was made with, as far as it reads them."""
        return all(places.get(slot) == place for slot, place in self._places.items())

    def moved(self, places: Places) -> Route:
        """The same division over other places."""
        each = self.extents.each
        return Route(self.division, self.active, places, self._device, each, num_slots=self.num_slots)

    def reads(self, table: Table) -> None:
        """An op of this route reads a table by slot. Who keeps ops for longer than adapters stay wants to know."""

    def keeps(self, *made: Tensor) -> None:
        """An op of this route reads what was made for it alone. Who replays what it asked for keeps that too."""

    def asks_host(self, reason: str) -> None:
        """An op of this route has the host look at numbers of the step; `reason` names it. Who replays refuses it."""

    @property
    def slot_of_token(self) -> Tensor:
        """[T] The slot of every token (int64); 0 where the token has no adapter."""
        if self._slot_T is None:
            slot_T = torch.full((self.num_tokens,), BASE_SLOT, dtype=torch.int64)
            for run in self.runs:
                slot_T[run.first : run.last] = run.slot
            self._slot_T = slot_T.to(self._device)
        return self._slot_T

    @cached_property
    def segments(self) -> Segments:
        """The runs as a kernel reads them."""
        each = ((run.slot, run.first, run.last) for run in self.runs)
        return Segments(each, self.num_tokens, num_slots=self.num_slots)

    def runs_of(self, slots: Collection[int]) -> tuple[Run, ...]:
        """The runs of some of the adapters."""
        return tuple(run for run in self.runs if run.slot in slots)

    def personal(self, slots: Collection[int]) -> tuple[Personal, ...]:
        """The tokens of some of the adapters, each adapter's by themselves, in the order of the tokens; one adapter's
        may come in several pieces."""
        return tuple(Personal(run.slot, Subset(run.first, run.last, None)) for run in self.runs_of(slots))

    def generated(self, slots: Collection[int]) -> tuple[Personal, ...]:  # noqa: ARG002
        """The same of a step whose tokens were all generated. Of others `extents` says where they stand."""
        return ()

    def has_no_others(self, slots: Collection[int]) -> bool:
        """Whether no token is anybody else's, the base's among them."""
        return sum(run.last - run.first for run in self.runs_of(slots)) == self.num_tokens

    def together(self, slots: frozenset[int]) -> tuple[Together, ...]:
        """The tokens of some of the active adapters, in as few parts as can be."""
        runs, first = [], 0
        for run in self.runs_of(slots):
            last = first + run.last - run.first
            runs.append(Run(run.slot, first, last))
            first = last
        return (Together(self.subset(slots), self.slots_in(slots), tuple(runs)),)

    def span(self, slots: frozenset[int]) -> Span:
        """The stack rows of some of the adapters, all of them placed. Sites with the same adapters share one."""
        if slots not in self._spans:
            runs = [(run, self._places[run.slot]) for run in self.runs_of(slots)]
            self._spans[slots] = Span(self.num_tokens, runs, self._device)
        return self._spans[slots]

    def subset(self, slots: frozenset[int]) -> Tokens:
        """The tokens of some of the active adapters."""
        if slots not in self._subsets:
            ranges = [(run.first, run.last) for run in self.runs_of(slots)]
            self._subsets[slots] = subset_of(ranges, self._device)
        return self._subsets[slots]

    def slots_in(self, slots: frozenset[int]) -> Tensor:
        """[N] The slot of each token of `subset(slots)`."""
        if slots not in self._slots:
            self._slots[slots] = self.subset(slots).take(self.slot_of_token)
        return self._slots[slots]

    def chosen(self, own: Truths) -> tuple[Tokens, Tensor]:
        """The tokens of the active adapters that a table has, and the slots of what is taken of them."""
        slots = self.active.intersection(own.slots)
        return self.subset(slots), self.slots_in(slots)

    def rest(self, slots: frozenset[int]) -> Tokens | None:
        """The tokens of everybody else, the base's among them; None when there are none."""
        ranges, at = [], 0
        for run in self.runs_of(slots):
            ranges.append((at, run.first))
            at = run.last
        ranges.append((at, self.num_tokens))
        ranges = [(first, last) for first, last in ranges if first < last]
        return subset_of(ranges, self._device) if ranges else None

    def batches(self, slots: frozenset[int]) -> tuple[Alike, ...]:
        """The runs of some of the active adapters by length."""
        if slots not in self._batches:
            runs = self.runs_of(slots)
            each = batches_of([(run.first, run.last) for run in runs], self._device)
            self._batches[slots] = tuple(Alike(one, tuple(runs[m].slot for m in one.members)) for one in each)
        return self._batches[slots]


class Lane:
    """Where the sites of one stream find the current route; None is the plain base.

    A lane keeps its last route, so that a step which divides the tokens as the step before did starts with
    all index tensors. Whoever changes adapters or places tells it so.
    """

    __slots__ = ("_kept", "route")

    def __init__(self) -> None:
        self.route: Route | None = None
        self._kept: Route | None = None

    def enter(
        self,
        division: Division,
        adapted: Collection[int],
        places: Places,
        device: torch.device,
        extents: tuple[Extent, ...] = (),
        *,
        num_slots: int = 0,
    ) -> None:
        """Make the route of this division, and of these extents where somebody asks for them, the current one."""
        kept = self._kept
        if kept is None or (kept.division, kept.extents.each) != (division, extents) or not kept.holds(places):
            self._kept = Route(division, adapted, places, device, extents, num_slots=num_slots)
        self.route = self._kept

    def move(self, places: Places) -> None:
        """Adapters have new places; the division stays."""
        self._kept = None
        if self.route is not None:
            self.route = self._kept = self.route.moved(places)

    def forget(self) -> None:
        """Adapters have changed: no route of before holds."""
        self.route = self._kept = None
