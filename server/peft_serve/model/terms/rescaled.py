"""Low-rank maps whose factors many adapters share: one pair of products for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakValueDictionary

from torch import Tensor

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.primitives import Affine, Edit, Rescaled
from peft_serve.kernels.maps import add_rescaled_
from peft_serve.kernels.subsets import Subset
from peft_serve.model.routing import Route
from peft_serve.model.terms.tables import SlotTable
from peft_serve.model.terms.term import OutOp


@dataclass(frozen=True, slots=True, weakref_slot=True)
class _Factors:
    """A and B on the device, larger than any site that reads them."""

    a_RI: Tensor
    b_OR: Tensor


class SharedFactors:
    """The factors of a whole model by key: held while any site of any adapter uses them."""

    def __init__(self) -> None:
        self._held: WeakValueDictionary[str, _Factors] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._held)

    def of(self, given: Rescaled, like: Tensor) -> _Factors:
        """The factors of this key. Raises ValueError if those on the device are of another size."""
        held = self._held.get(given.key)
        if held is None:
            held = self._held[given.key] = _Factors(given.a_RI.to(like), given.b_OR.to(like))
        if held.a_RI.shape != given.a_RI.shape or held.b_OR.shape != given.b_OR.shape:
            raise ValueError(f"two adapters name factors of different sizes '{given.key}'; compile both again")
        return held


@dataclass(frozen=True, slots=True)
class _Group:
    """The adapters with one key."""

    factors: _Factors
    inner: SlotTable
    outer: SlotTable


@dataclass(frozen=True, slots=True)
class _Part:
    """The tokens of one key's adapters, their slots, and what to read for them."""

    subset: Subset
    slot_N: Tensor
    group: _Group


class RescaledMaps:
    """y -> y + u * (B (v * (A x))), by key."""

    def __init__(self, spec: SiteSpec, like: Tensor, shared: SharedFactors) -> None:
        self._spec = spec
        self._like = like
        self._shared = shared
        self._groups: dict[str, _Group] = {}

    def put(self, slot: int, edit: Edit) -> None:
        if isinstance(edit, Affine):
            for one in edit.maps:
                if isinstance(one, Rescaled):
                    self._put(slot, one)

    def _put(self, slot: int, given: Rescaled) -> None:
        factors = self._shared.of(given, self._like)
        if given.key not in self._groups:
            inner, outer = (SlotTable(self._like.new_zeros(len(t))) for t in (given.inner_R, given.outer_O))
            self._groups[given.key] = _Group(factors, inner, outer)
        group = self._groups[given.key]
        group.inner.put(slot, given.inner_R)
        group.outer.put(slot, given.outer_O)

    def drop(self, slot: int) -> None:
        for key, group in list(self._groups.items()):
            group.inner.drop(slot)
            group.outer.drop(slot)
            if not group.outer.slots:
                del self._groups[key]

    def op(self, route: Route) -> OutOp | None:
        parts: list[_Part] = []
        for group in self._groups.values():
            slots = route.active.intersection(group.outer.slots)
            if slots:
                subset = route.subset(slots)
                parts.append(_Part(subset, subset.take(route.slot_of_token), group))
        if not parts:
            return None
        is_lookup = self._spec.kind is SiteKind.EMBEDDING

        def add(y_TO: Tensor, x_T: Tensor) -> None:
            for part in parts:
                factors, slot_N = part.group.factors, part.slot_N
                a_RI = factors.a_RI[:, : self._spec.in_features]
                b_OR = factors.b_OR[: self._spec.out_features]
                inner_NR, outer_NO = (t.rows.index_select(0, slot_N) for t in (part.group.inner, part.group.outer))
                add_rescaled_(y_TO, x_T, part.subset, a_RI, b_OR, inner_NR, outer_NO, is_lookup=is_lookup)

        return add
