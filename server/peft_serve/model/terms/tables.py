"""A vector or a word for each slot, in one table that the slots of tokens index."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_serve.kernels.subsets import Tokens
from peft_serve.model.routing import Route


class SlotTable:
    """A vector for each slot, [S, D]; slots without one, the base among them, have the neutral row."""

    def __init__(self, neutral_D: Tensor) -> None:
        self._neutral_D = neutral_D
        self._table_SD: Tensor | None = None
        self.slots: set[int] = set()

    @property
    def rows(self) -> Tensor:
        """[S, D]"""
        assert self._table_SD is not None, "read only where a slot has a row"
        return self._table_SD

    def put(self, slot: int, vector_D: Tensor) -> None:
        self._reach(slot)
        self.rows[slot] = vector_D
        self.slots.add(slot)

    def drop(self, slot: int) -> None:
        if slot in self.slots:
            self.slots.discard(slot)
            self.rows[slot] = self._neutral_D

    def end(self) -> None:
        """It has no vectors and gets none any more; who read it where it was finds it elsewhere."""
        assert not self.slots, "every slot is dropped before"
        self._table_SD = self._neutral_D.repeat(1, 1)

    def _reach(self, slot: int) -> None:
        """Make room up to `slot` and beyond, so that slots in use index the table whoever they belong to."""
        old = self._table_SD
        if old is not None and slot < old.shape[0]:
            return
        self._table_SD = self._neutral_D.repeat(max(2 * slot, 8), 1)
        if old is not None:
            self._table_SD[: old.shape[0]] = old

    def index(self, route: Route) -> Tensor | None:
        """The row of every token, or None if no active adapter has a row."""
        if self.slots.isdisjoint(route.active):
            return None
        self._reach(route.num_slots - 1)
        route.reads(self)
        return route.slot_of_token


class TruthTable(SlotTable):
    """Who has something: rows [S, 1] that are true."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.zeros(1, dtype=torch.bool, device=device))
        self._yes = torch.ones(1, dtype=torch.bool, device=device)

    def add(self, slot: int) -> None:
        self.put(slot, self._yes)

    def tokens(self, route: Route) -> tuple[Tokens, Tensor] | None:
        """The tokens of the active adapters that are in it, and the slots of what `take` gives of them."""
        if self.index(route) is None:
            return None
        return route.chosen(self)
