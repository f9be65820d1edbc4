"""The route of a captured step: whose tokens they are stands in tables on the device, and changes from step to step.

What an op may read of it is the slot of each token and the tiles of a kernel; both are filled before a replay. Ops read
tables by slot, and those may move when adapters come; the route remembers which it gave rows of.

A part that is computed for an adapter by itself is computed for all tokens of the step, and put to those of its slot by
choice. What it reads belongs to the adapter that was there at the capture, so it is noted whose parts there are
(`PersonalSlots`). All tokens of adapters that ask where they stand were generated. What has the host look at numbers is
refused.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import torch
from torch import Tensor

from peft_serve.kernels.capture import NotCapturable
from peft_serve.kernels.low_rank import Segments
from peft_serve.kernels.subsets import Batch, Chosen, Tokens
from peft_serve.model.extents import Extents
from peft_serve.model.routing import Alike, Personal, Route, Run, Span, Table, Together, Truths

MOST_PERSONAL: Final = 4
"""Adapters of one graph with parts of their own. Each costs its launches in every replay, whether it has a row in the
step or not, so many of them would cost more than the launches that the graph saves."""

TOO_MANY_PERSONAL: Final = f"more than {MOST_PERSONAL} adapters have parts that are computed one by one"


class PersonalSlots:
    """The adapters whose parts are computed one by one in a pass that is captured; of all its routes together."""

    def __init__(self) -> None:
        self.slots: frozenset[int] = frozenset()

    def add(self, slots: frozenset[int]) -> None:
        """They have such a part. NotCapturable where there are too many."""
        self.slots |= slots
        if len(self.slots) > MOST_PERSONAL:
            raise NotCapturable(TOO_MANY_PERSONAL)


class StaticRoute(Route):
    """See the module. `active` are the adapters that are installed as it is captured; others that act in the same
    manner are served by what is captured all the same, but for those with personal parts."""

    def __init__(
        self, active: frozenset[int], slot_T: Tensor, segments: Segments, personal: PersonalSlots, *, num_slots: int
    ) -> None:
        """`slot_T` and `segments` are filled before each replay, with slots below `num_slots`."""
        self.num_tokens = len(slot_T)
        self.active = active
        self.num_slots = num_slots
        self.extents = Extents((), slot_T.device)
        self._slot_T = slot_T
        self._held = segments
        self._personal = personal
        self._are: dict[frozenset[int], Tensor] = {}
        self._kept: list[Tensor] = []
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

    def keeps(self, *made: Tensor) -> None:
        self._kept += made

    def asks_host(self, reason: str) -> None:
        raise NotCapturable(reason)

    @property
    def is_current(self) -> bool:
        """Whether the tables that its ops read are where they were."""
        return all(table.rows is rows for table, rows in self.tables)

    def personal(self, slots: Collection[int]) -> tuple[Personal, ...]:
        own = sorted(self.active.intersection(slots))
        return tuple(Personal(slot, self.subset(frozenset({slot}))) for slot in own)

    def generated(self, slots: Collection[int]) -> tuple[Personal, ...]:
        return self.personal(slots)

    def has_no_others(self, slots: Collection[int]) -> bool:  # noqa: ARG002
        return False  # the tokens may be anybody's at the next replay

    def together(self, slots: frozenset[int]) -> tuple[Together, ...]:
        return tuple(
            Together(one.tokens, self.slot_of_token, (Run(one.slot, 0, self.num_tokens),))
            for one in self.personal(slots)
        )

    def span(self, slots: frozenset[int]) -> Span:  # noqa: ARG002
        raise NotCapturable("low-rank terms are read from stacks, since no kernel of ours computes them")

    def subset(self, slots: frozenset[int]) -> Tokens:
        self._personal.add(slots)
        return Chosen(self._are_S1(slots), self.slot_of_token)

    def slots_in(self, slots: frozenset[int]) -> Tensor:  # noqa: ARG002
        return self.slot_of_token

    def chosen(self, own: Truths) -> tuple[Tokens, Tensor]:
        return Chosen(own.rows, self.slot_of_token), self.slot_of_token

    def rest(self, slots: frozenset[int]) -> Tokens | None:
        are_others_S1 = ~self._are_S1(slots)
        self.keeps(are_others_S1)
        return Chosen(are_others_S1, self.slot_of_token)

    def batches(self, slots: frozenset[int]) -> tuple[Alike, ...]:
        return tuple(Alike(Batch((0,), self.num_tokens, one.tokens), (one.slot,)) for one in self.personal(slots))

    def _are_S1(self, slots: frozenset[int]) -> Tensor:  # noqa: N802  # the suffix names dimensions
        """True for these slots, once for all sites. Made on the device: nothing is sent within what is captured."""
        if slots not in self._are:
            slot_S1 = torch.arange(self.num_slots, device=self.device)[:, None]
            are_S1 = torch.zeros_like(slot_S1, dtype=torch.bool)
            for slot in slots:
                are_S1 |= slot_S1 == slot
            self._are[slots] = are_S1
        return self._are[slots]
