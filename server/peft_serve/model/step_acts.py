"""What the adapters of a decode step do, as far as a graph of the step depends on it.

A graph serves whoever does no more than what it was captured for, since it reads adapters from tables by slot. Parts
that are computed for an adapter by itself are the exception: they are this adapter's, in this slot, for as long as it
is installed. Which kinds of adapters have such parts is learnt when the first of a kind is captured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from peft_serve.model.manner import Act
from peft_serve.model.sites import AdaptedSites, Installed

Kind = frozenset[Act]
"""What an adapter does; those of one recipe are of one kind."""


@dataclass(frozen=True, slots=True)
class Acts:
    """What the adapters of a step do, each kind once, and those among them that have parts of their own."""

    kinds: frozenset[Kind] = frozenset()
    personal: frozenset[Installed] = frozenset()

    def are_within(self, others: Acts) -> bool:
        """Whether a graph of the others serves these.

        Idle parts of single adapters cost as much as acting ones, so there may be no more of them: who has none pays
        for nobody's, and the base for nothing of adapters.
        """
        num_idle = len(others.personal) - len(self.personal)
        return (
            bool(self.kinds)
            and self.kinds <= others.kinds
            and self.personal <= others.personal
            and num_idle <= len(self.personal)
        )


class StepActs:
    """Tells what the adapters of a step do. One thread at a time."""

    def __init__(self, adapted: AdaptedSites) -> None:
        self._adapted = adapted
        self._personal_kinds: set[Kind] = set()

    def of(self, slots: Iterable[int]) -> Acts:
        """What the adapters in these slots do. ValueError for a slot that is empty."""
        each = [self._adapted.installed(slot) for slot in slots]
        personal = (one for one in each if one.acts in self._personal_kinds)
        return Acts(frozenset(one.acts for one in each), frozenset(personal))

    def learn(self, slots: Iterable[int]) -> None:
        """The adapters in these slots have parts that are computed one by one, and so have all of their kinds."""
        self._personal_kinds.update(self._adapted.installed(slot).acts for slot in slots)

    @property
    def num_learnt(self) -> int:
        """Kinds that are known to have such parts."""
        return len(self._personal_kinds)

    def forget(self) -> None:
        """All that was learnt. What was captured by it is not to be asked for again."""
        self._personal_kinds.clear()

    def are_there(self, acts: Acts) -> bool:
        """Whether the adapters with parts of their own are still the ones in their slots."""
        return all(self._adapted.has(one) for one in acts.personal)
