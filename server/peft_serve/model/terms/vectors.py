"""Terms that are one vector of the normal form: scales of inputs and outputs, and the shift."""

from __future__ import annotations

from torch import Tensor

from peft_serve.adapters.primitives import Edit
from peft_serve.kernels import grouped
from peft_serve.model.routing import Route
from peft_serve.model.terms.tables import SlotTable
from peft_serve.model.terms.term import InOp, OutOp


class VectorTerm:
    """A term that is one vector of the normal form; `field` is its name there."""

    def __init__(self, field: str, neutral_D: Tensor) -> None:
        self._field = field
        self._table = SlotTable(neutral_D)

    def put(self, slot: int, edit: Edit) -> None:
        vector_D = getattr(edit, self._field, None)
        if vector_D is not None:
            self._table.put(slot, vector_D)

    def drop(self, slot: int) -> None:
        self._table.drop(slot)

    def table(self, route: Route) -> Tensor | None:
        """[S, D] by slot, or None if no active adapter has such a vector."""
        return None if self._table.index(route) is None else self._table.rows


class InScale(VectorTerm):
    """x -> s_in * x."""

    def op(self, route: Route) -> InOp | None:
        slot_T = self._table.index(route)
        if slot_T is None:
            return None
        rows_SI = self._table.rows
        return lambda x_TI: grouped.scaled_by_token(x_TI, rows_SI, slot_T)


class IdScale(VectorTerm):
    """s_in at an embedding: the input is one-hot, so the scale of its id goes to the looked-up row."""

    def op(self, route: Route) -> OutOp | None:
        slot_T = self._table.index(route)
        if slot_T is None:
            return None
        rows_SV = self._table.rows
        return lambda y_TO, ids_T: grouped.scale_by_id_(y_TO, rows_SV, slot_T, ids_T)


class OutScale(VectorTerm):
    """y -> s_out * y, bias included."""

    def op(self, route: Route) -> OutOp | None:
        slot_T = self._table.index(route)
        if slot_T is None:
            return None
        rows_SO = self._table.rows
        return lambda y_TO, _: grouped.scale_by_token_(y_TO, rows_SO, slot_T)


class Shift(VectorTerm):
    """y -> y + c."""

    def op(self, route: Route) -> OutOp | None:
        slot_T = self._table.index(route)
        if slot_T is None:
            return None
        rows_SO = self._table.rows
        return lambda y_TO, _: grouped.add_by_token_(y_TO, rows_SO, slot_T)
