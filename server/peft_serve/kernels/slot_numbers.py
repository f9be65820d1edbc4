"""What a kernel on a CPU is told of a layer's adapters: numbers by slot behind some of the layer's own, one array."""

from __future__ import annotations

from array import array
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SlotFactors:
    """Where what a layer's adapters bring lies, for as long as no adapter comes or goes."""

    numbers: array[int]

    @property
    def address(self) -> int:
        return self.numbers.buffer_info()[0]


class SlotNumbers:
    """`each` numbers of every slot, all 0 where a slot has nothing, behind `header`."""

    def __init__(self, *header: int, each: int) -> None:
        self._header, self._each = len(header), each
        self._numbers = array("q", header)

    def reaching(self, num_slots: int) -> SlotFactors:
        """The table with room for so many slots. Where there was none it moves, away from those who had it before."""
        missing = self._header + num_slots * self._each - len(self._numbers)
        if missing > 0:
            self._numbers = self._numbers + array("q", bytes(8 * missing))
        return SlotFactors(self._numbers)

    def write(self, slot: int, *numbers: int) -> None:
        """What the slot has from now on, in the table that everybody reads."""
        assert len(numbers) == self._each, "a slot has so many numbers"
        self.reaching(slot + 1)
        at = self._header + slot * self._each
        self._numbers[at : at + self._each] = array("q", numbers)

    def clear(self, slot: int) -> None:
        """The slot has nothing."""
        self.write(slot, *[0] * self._each)
