"""Extents: where the tokens of a stream stand in the sequences of their rows.

Only interventions ask. An adapter that has them sees the sequence of a row in one forward, and each token that is
generated behind it in a forward of its own, in which it is the first position and the last. Pure arithmetic over
places; knows no site and no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor


class Unit(IntEnum):
    """Which half of an intervention acts."""

    FIRST = 0
    LAST = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """Tokens of one row, side by side in a stream. Padding behind them belongs to no extent."""

    slot: int
    at: int  # where the first of them lies in the stream
    num_tokens: int
    first: int  # its place in the row's sequence; below 0: virtual tokens come first, which are not of the sequence
    length: int  # of the sequence
    is_whole: bool = False  # rows of this stream always hold their sequences whole (an encoder's)

    @classmethod
    def of_prompt(cls, slot: int, at: int, num_tokens: int, *, first: int, length: int) -> Extent:
        """Tokens of a decoder. Those behind the prompt, generated or of a choice that is scored, are all alike."""
        if first >= length:
            first = length = 0
        return cls(slot=slot, at=at, num_tokens=num_tokens, first=first, length=length)


@dataclass(frozen=True, slots=True)
class Moves:
    """What comes to stand at `targets` of a stream is made from what stands at `sources`."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]


class Extents:
    """The extents of a route, and what is asked about them, computed once for all sites."""

    def __init__(self, each: tuple[Extent, ...], device: torch.device) -> None:
        self.each = each
        self._device = device
        self._moves: dict[tuple[int, int, int], tuple[Moves, Moves]] = {}
        self._places: dict[tuple[int, ...], Tensor] = {}

    @cached_property
    def slots(self) -> frozenset[int]:
        return frozenset(extent.slot for extent in self.each)

    def moves(self, slot: int, num_first: int, num_last: int) -> tuple[Moves, Moves]:
        """What the two units of an intervention on so many first and last positions edit, by `Unit`."""
        key = (slot, num_first, num_last)
        if key not in self._moves:
            each = [
                move
                for extent in self.each
                if extent.slot == slot
                for move in _in_stream(extent, num_first=num_first, num_last=num_last)
            ]
            self._moves[key] = (_moves_of(Unit.FIRST, each), _moves_of(Unit.LAST, each))
        return self._moves[key]

    def index(self, places: tuple[int, ...]) -> Tensor:
        """Places of the stream as an index tensor."""
        if places not in self._places:
            self._places[places] = torch.tensor(places, dtype=torch.long, device=self._device)
        return self._places[places]


_Move = tuple[Unit, int, int]
"""(unit, source, target)"""


def unit_of_generated(num_first: int, num_last: int) -> Unit | None:
    """Which unit of an intervention on so many first and last positions edits a token that was generated, if any."""
    return next((unit for unit, _, _ in _in_sequence(1, num_first, num_last, is_whole=False)), None)


def _moves_of(unit: Unit, each: Sequence[_Move]) -> Moves:
    mine = [(source, target) for one, source, target in each if one is unit]
    return Moves(tuple(source for source, _ in mine), tuple(target for _, target in mine))


def _in_stream(extent: Extent, *, num_first: int, num_last: int) -> Iterator[_Move]:
    """The moves of an extent's tokens, by places in the stream."""
    shift = extent.at - extent.first
    stop = extent.first + extent.num_tokens
    for unit, source, target in _in_sequence(extent.length, num_first, num_last, is_whole=extent.is_whole):
        if extent.first <= target < stop:
            yield unit, source + shift, target + shift
    for place in range(max(extent.first, extent.length), stop):
        for unit, _, _ in _in_sequence(1, num_first, num_last, is_whole=False):
            yield unit, place + shift, place + shift


def _in_sequence(length: int, num_first: int, num_last: int, *, is_whole: bool) -> Iterator[_Move]:
    """The moves of one forward over a sequence, by places in it (`ReftModule` of adapters 1.3).

    Where both units act, the last one's result stays. Not so in a sequence shorter than `num_last`: the library then
    finds the first unit's results among those of the last positions, so that results stand elsewhere than where they
    were made. A row that is whole gets what the library gives. A prompt may come in parts, and there every result
    stays in its place, the first unit's before the last one's; for a single token both are the same.
    """
    here_first, here_last = min(num_first, length), min(num_last, length)
    if num_last <= length or not here_first:
        yield from ((Unit.FIRST, place, place) for place in range(min(here_first, length - here_last)))
        yield from ((Unit.LAST, place, place) for place in range(length - here_last, length))
    elif is_whole:
        skipped = max(0, here_first + length - num_last)
        for target in range(length):
            found = skipped + target
            yield (Unit.FIRST, found, target) if found < here_first else (Unit.LAST, found - here_first, target)
    else:
        yield from ((Unit.FIRST, place, place) for place in range(here_first))
        yield from ((Unit.LAST, place, place) for place in range(here_first, length))
