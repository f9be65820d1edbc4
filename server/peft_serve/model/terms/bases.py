"""Weighed sums of low-rank maps whose factors many adapters share: one product with the large factor for all of them.

What is on the device for an adapter is its weights and gains. The sum as a matrix would be faster for an adapter on
its own, as long as its matrices fit; the factors are read once for all adapters of a step, a matrix once for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from peft_serve.adapters.base import SiteSpec
from peft_serve.adapters.primitives import Affine, Edit
from peft_serve.adapters.shared_primitives import SharedBases
from peft_serve.kernels.bases import Gained, add_bases_, add_transposed_bases_
from peft_serve.kernels.subsets import Tokens
from peft_serve.model.routing import Route, Run
from peft_serve.model.terms.shared import Factors, SharedFactors, numbered
from peft_serve.model.terms.tables import SlotTable
from peft_serve.model.terms.term import OutOp

Place = tuple[str, int, int, bool]
"""Key, how many of it the adapter has before, number of gain vectors, direction: what one product can serve."""


@dataclass(frozen=True, slots=True)
class _Group:
    """The adapters of one place. Gains are as large as a matrix over its ranks: held by slot, in no table."""

    factors: Factors
    weights: SlotTable  # [S, C]
    gains: dict[int, Tensor]  # slot -> [Q, S]
    is_transposed: bool


@dataclass(frozen=True, slots=True)
class _Part:
    """The tokens of some of a group's adapters, their slots and their gains, run by run."""

    tokens: Tokens
    slot_N: Tensor
    runs: tuple[Gained, ...]
    group: _Group


class BasesMaps:
    """y -> y + sum_pq B[:, pq] w[p, q] (A[p] . (g[q] * x)), or with the transpose, by key."""

    def __init__(self, spec: SiteSpec, like: Tensor, shared: SharedFactors) -> None:
        self._like = like
        self._shared = shared
        self._small, self._large = sorted((spec.in_features, spec.out_features))
        self._groups: dict[Place, _Group] = {}

    def put(self, slot: int, edit: Edit) -> None:
        if isinstance(edit, Affine) and edit.maps:
            for number, one in numbered(each for each in edit.maps if isinstance(each, SharedBases)):
                self._put(slot, number, one)

    def _put(self, slot: int, number: int, given: SharedBases) -> None:
        factors = self._shared.of(given, self._like)
        place = given.key, number, len(given.gains_QS), given.is_transposed
        if place not in self._groups:
            weights = SlotTable(self._like.new_zeros(given.weights_RQ.numel()))
            self._groups[place] = _Group(factors, weights, {}, given.is_transposed)
        group = self._groups[place]
        group.weights.put(slot, given.weights_RQ.flatten())
        group.gains[slot] = given.gains_QS.to(self._like)

    def drop(self, slot: int) -> None:
        for place, group in list(self._groups.items()):
            group.weights.drop(slot)
            group.gains.pop(slot, None)
            if not group.gains:
                del self._groups[place]

    def op(self, route: Route) -> OutOp | None:
        parts: list[_Part] = []
        for group in self._groups.values():
            if group.weights.index(route) is not None:
                each = route.together(route.active.intersection(group.gains))
                parts += (_Part(one.tokens, one.slot_N, _gained(one.runs, group), group) for one in each)
        if not parts:
            return None

        def add(y_TO: Tensor, x_TI: Tensor) -> None:
            for part in parts:
                group = part.group
                weights_NC = group.weights.rows.index_select(0, part.slot_N)
                a_RS = group.factors.a[:, : self._small]
                b_LC = group.factors.b[: self._large, : weights_NC.shape[1]]
                add_them_ = add_transposed_bases_ if group.is_transposed else add_bases_
                add_them_(y_TO, x_TI, part.tokens, a_RS, b_LC, weights_NC, part.runs)

        return add


def _gained(runs: Sequence[Run], group: _Group) -> tuple[Gained, ...]:
    """The runs with their gains."""
    return tuple(Gained(run.first, run.last, group.gains[run.slot]) for run in runs)
