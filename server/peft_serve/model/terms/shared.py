"""Factors that the maps of many adapters share: on the device once for all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakValueDictionary

from torch import Tensor

from peft_serve.adapters.shared_primitives import Rescaled, SharedBases, SharedMap

M = TypeVar("M", Rescaled, SharedBases)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Factors:
    """A and B on the device, larger than any site that reads them."""

    a: Tensor
    b: Tensor


class SharedFactors:
    """The factors of a whole model by key: held while any site of any adapter uses them."""

    def __init__(self) -> None:
        self._held: WeakValueDictionary[str, Factors] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._held)

    def of(self, given: SharedMap, like: Tensor) -> Factors:
        """The factors of this key. Raises ValueError if those on the device are of another size."""
        a, b = given.factors
        held = self._held.get(given.key)
        if held is None:
            held = self._held[given.key] = Factors(a.to(like), b.to(like))
        if held.a.shape != a.shape or held.b.shape != b.shape:
            raise ValueError(f"two adapters name factors of different sizes '{given.key}'; compile both again")
        return held


def numbered(maps: Iterable[M]) -> Iterator[tuple[int, M]]:
    """Each map, and how many of its key came before: of one site's maps, several of one adapter may share factors."""
    seen: Counter[str] = Counter()
    for one in maps:
        yield seen[one.key], one
        seen[one.key] += 1
