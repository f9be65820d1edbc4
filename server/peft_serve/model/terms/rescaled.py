"""Low-rank maps whose factors many adapters share: one pair of products for all of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.primitives import Affine, Edit
from peft_serve.adapters.shared_primitives import Rescaled
from peft_serve.kernels.maps import add_rescaled_
from peft_serve.kernels.subsets import Tokens
from peft_serve.model.routing import Route
from peft_serve.model.terms.shared import Factors, SharedFactors, numbered
from peft_serve.model.terms.tables import SlotTable, TruthTable
from peft_serve.model.terms.term import OutOp


@dataclass(frozen=True, slots=True)
class _Group:
    """The adapters with one key."""

    factors: Factors
    own: TruthTable
    inner: SlotTable
    outer: SlotTable

    def tables(self) -> tuple[SlotTable, ...]:
        return self.own, self.inner, self.outer


@dataclass(frozen=True, slots=True)
class _Part:
    """The tokens of one key's adapters, their slots, and what to read for them."""

    subset: Tokens
    slot_N: Tensor
    group: _Group


class RescaledMaps:
    """y -> y + u * (B (v * (A x))), by key."""

    def __init__(self, spec: SiteSpec, like: Tensor, shared: SharedFactors) -> None:
        self._spec = spec
        self._like = like
        self._shared = shared
        self._groups: dict[tuple[str, int], _Group] = {}

    def put(self, slot: int, edit: Edit) -> None:
        if isinstance(edit, Affine) and edit.maps:
            for number, one in numbered(each for each in edit.maps if isinstance(each, Rescaled)):
                self._put(slot, number, one)

    def _put(self, slot: int, number: int, given: Rescaled) -> None:
        factors = self._shared.of(given, self._like)
        place = given.key, number
        if place not in self._groups:
            inner, outer = (SlotTable(self._like.new_zeros(len(t))) for t in (given.inner_R, given.outer_O))
            self._groups[place] = _Group(factors, TruthTable(self._like.device), inner, outer)
        group = self._groups[place]
        group.inner.put(slot, given.inner_R)
        group.outer.put(slot, given.outer_O)
        group.own.add(slot)

    def drop(self, slot: int) -> None:
        for place, group in list(self._groups.items()):
            for table in group.tables():
                table.drop(slot)
            if not group.outer.slots:
                del self._groups[place]  # and the factors with it, if no other site has them
                for table in group.tables():
                    table.end()

    def op(self, route: Route) -> OutOp | None:
        parts: list[_Part] = []
        for group in self._groups.values():
            tokens = group.own.tokens(route)
            if tokens is not None:
                group.inner.index(route)
                group.outer.index(route)
                parts.append(_Part(*tokens, group))
        if not parts:
            return None
        is_lookup = self._spec.kind is SiteKind.EMBEDDING

        def add(y_TO: Tensor, x_T: Tensor) -> None:
            for part in parts:
                factors, slot_N = part.group.factors, part.slot_N
                a_RI = factors.a[:, : self._spec.in_features]
                b_OR = factors.b[: self._spec.out_features]
                inner_NR, outer_NO = (t.rows.index_select(0, slot_N) for t in (part.group.inner, part.group.outer))
                add_rescaled_(y_TO, x_T, part.subset, a_RI, b_OR, inner_NR, outer_NO, is_lookup=is_lookup)

        return add
