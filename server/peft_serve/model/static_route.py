"""The route of a captured step: whose tokens they are stands in tables on the device, and changes from step to step.

What an op may read of it is the slot of each token and the tiles of a kernel; both are filled before a replay. An op
that asks for anything else would have it of one step for all, so it is refused, and its adapters are served call by
call. Ops read tables by slot, and those may move when adapters come; the route remembers which it gave rows of.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from peft_serve.kernels.capture import NotCapturable
from peft_serve.kernels.low_rank import Segments
from peft_serve.kernels.subsets import Chosen, Tokens
from peft_serve.model.extents import Extents
from peft_serve.model.routing import Alike, Personal, Route, Span, Table, Together, Truths


class StaticRoute(Route):
    """See the module. `active` are the adapters that are installed as it is captured; others that act in the same
    manner are served by what is captured all the same."""

    def __init__(self, active: frozenset[int], slot_T: Tensor, segments: Segments, *, num_slots: int) -> None:
        """`slot_T` and `segments` are filled before each replay, with slots below `num_slots`."""
        self.num_tokens = len(slot_T)
        self.active = active
        self.num_slots = num_slots
        self.extents = Extents((), slot_T.device)
        self._slot_T = slot_T
        self._held = segments
        self.tables: list[tuple[Table, Tensor]] = []

    @property
    def device(self) -> torch.device:
        return self.slot_of_token.device

    @property
    def slot_of_token(self) -> Tensor:
        assert self._slot_T is not None, "it is given"
        return self._slot_T

    @property
    def segments(self) -> Segments:
        return self._held

    def reads(self, table: Table) -> None:
        self.tables.append((table, table.rows))

    @property
    def is_current(self) -> bool:
        """Whether the tables that its ops read are where they were."""
        return all(table.rows is rows for table, rows in self.tables)

    def personal(self, slots: Collection[int]) -> tuple[Personal, ...]:
        if not self.active.isdisjoint(slots):
            raise NotCapturable("an adapter has a part that is computed for its tokens by themselves")
        return ()

    def has_no_others(self, slots: Collection[int]) -> bool:  # noqa: ARG002
        return False

    def span(self, slots: frozenset[int]) -> Span:  # noqa: ARG002
        raise NotCapturable("low-rank terms are read from stacks, since no kernel of ours computes them")

    def subset(self, slots: frozenset[int]) -> Tokens:  # noqa: ARG002
        raise NotCapturable("an adapter has a part that is computed for the tokens of some adapters")

    def chosen(self, own: Truths) -> tuple[Tokens, Tensor]:
        return Chosen(own.rows, self.slot_of_token), self.slot_of_token

    def asks_host(self, reason: str) -> None:
        raise NotCapturable(reason)

    def rest(self, slots: frozenset[int]) -> Tokens | None:  # noqa: ARG002
        raise NotCapturable("routers divide tokens into those with adapters and those without")

    def together(self, slots: frozenset[int]) -> tuple[Together, ...]:  # noqa: ARG002
        raise NotCapturable("an adapter has a part that is computed for the tokens of some adapters")

    def batches(self, slots: frozenset[int]) -> tuple[Alike, ...]:  # noqa: ARG002
        raise NotCapturable("an adapter has a part that is stacked with those of others for each step")
