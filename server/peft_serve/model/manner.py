"""In which manner adapters act: at which sites, and by which terms there, whatever their numbers are.

A thousand adapters of one recipe act in one manner, so what is worked out for some of them holds for all the others: a
step with the tokens of other adapters, or with other tokens of the same ones, asks for nothing new.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from peft_serve.adapters.primitives import Edit, Paired, Rows
from peft_serve.adapters.shared_primitives import Rescaled

Act = tuple[str, str, tuple[str, ...]]
"""The path of a site, the kind of edit there, and which of its fields are given, by what kind of value."""


@dataclass(frozen=True, slots=True, eq=False)
class Manner:
    """What the adapters of a step do, for as long as no adapter comes or goes."""

    generation: int


class Manners:
    """The manners of what is installed now."""

    def __init__(self) -> None:
        self._generation = 0
        self._known: dict[frozenset[frozenset[Act]], Manner] = {}

    @property
    def generation(self) -> int:
        """How often adapters have changed."""
        return self._generation

    def of(self, acts: Iterable[frozenset[Act]]) -> Manner:
        """The one manner of these adapters, told apart from others by being another object."""
        each = frozenset(acts)
        found = self._known.get(each)
        if found is None:
            found = self._known[each] = Manner(self._generation)
        return found

    def forget(self) -> None:
        """Adapters have changed: no manner of before comes again."""
        self._generation += 1
        self._known.clear()


def acts_of(edits: Mapping[str, Edit]) -> frozenset[Act]:
    """What an adapter does at its sites."""
    return frozenset((path, type(edit).__name__, _given(edit)) for path, edit in edits.items())


def _given(edit: Edit) -> tuple[str, ...]:
    values = ((field.name, getattr(edit, field.name)) for field in fields(edit))
    return tuple(f"{name}: {kind}" for name, value in values if (kind := _kind_of(value)))


def _kind_of(value: object) -> str:
    """What of it decides which terms act; nothing of what does nothing."""
    if value is None or (isinstance(value, Rows) and not len(value.ids_N)):
        return ""
    if isinstance(value, str | bool):  # an activation, or which form of a bottleneck it is
        return f"{type(value).__name__} {value}"
    if isinstance(value, Mapping):  # parameters by their names: one that is missing is the base's
        return ", ".join(sorted(map(str, value)))
    if isinstance(value, tuple):
        return ", ".join(sorted(_kind_of(each) for each in value))
    if isinstance(value, Paired):
        return f"{type(value).__name__} {value.group}"
    if isinstance(value, Rescaled):
        return f"{type(value).__name__} {value.key}"
    return type(value).__name__
