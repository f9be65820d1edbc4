"""Hot stacks: the low-rank rows of the adapters in use, side by side.

`StackLayout` is the ledger: it gives every hot adapter a contiguous range of rows, the same range at every
site. It knows no tensor. `SiteStack` is the memory: one site's A and B in that layout. An adapter whose rank
at a site is smaller than its range has zero rows there, and an adapter that does not touch a site has zeros.

An adapter keeps its range after it was last used, until somebody else needs the room. Ranges move only when
the layout is rebuilt: because the adapters of a step do not fit, or because they lie so far apart that steps
go through more than twice the rows they need for a while.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

_GRAIN = 32
_MIN_WIDTH = 8


def width_of(rank: int) -> int:
    """Rows that an adapter of this rank is given: the next power of two, so that few widths occur."""
    return max(_MIN_WIDTH, 1 << (rank - 1).bit_length())


@dataclass(frozen=True, slots=True)
class Place:
    """Rows [first, last) of every stack."""

    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """What has to be written after a change of the layout."""

    resized: bool = False  # every stack is made anew
    moved: bool = False  # places that were given before no longer hold
    slots: tuple[int, ...] = ()  # adapters whose rows are to be written


class StackLayout:
    """Which rows belong to whom. Slots are ordered by last use."""

    def __init__(self, *, patience: int = 8) -> None:
        self.capacity = 0
        self.places: dict[int, Place] = {}
        self._patience = patience
        self._num_wasteful = 0

    def use(self, widths: Mapping[int, int]) -> Moves:
        """Give these slots (rows wanted by slot, all positive) a place and count them as used last."""
        for slot in widths:
            if slot in self.places:
                self.places[slot] = self.places.pop(slot)
        wanted = [slot for slot in widths if slot not in self.places]
        for slot in wanted:
            if not self._append(slot, widths):
                return self._rebuild(widths)
        self._num_wasteful = self._num_wasteful + 1 if self._is_wasteful(widths) else 0
        if self._num_wasteful > self._patience:
            return self._rebuild(widths)
        return Moves(slots=tuple(wanted))

    def forget(self, slot: int) -> None:
        """The slot is empty; its rows may be given away."""
        self.places.pop(slot, None)

    def forget_all(self) -> None:
        """No rows are what they should be: the next use makes every stack anew."""
        self.places, self.capacity = {}, 0

    def check(self) -> None:
        """Ranges are inside the stacks and do not overlap."""
        at = 0
        for place in sorted(self.places.values(), key=lambda p: p.first):
            assert at <= place.first < place.last <= self.capacity, (at, place, self.capacity)
            at = place.last

    def _append(self, slot: int, keep: Mapping[int, int]) -> bool:
        """Find room, at the expense of adapters that are not in `keep`, the longest unused first."""
        while (first := self._gap(keep[slot])) is None:
            unused = next((other for other in self.places if other not in keep), None)
            if unused is None:
                return False
            del self.places[unused]
        self.places[slot] = Place(first, first + keep[slot])
        return True

    def _gap(self, width: int) -> int | None:
        """The first room that begins at a multiple of the width: adapters of one width lie on a grid."""
        at = 0
        for place in sorted(self.places.values(), key=lambda p: p.first):
            if place.first - at >= width:
                return at
            at = max(at, -(-place.last // width) * width)
        return at if self.capacity - at >= width else None

    def _is_wasteful(self, widths: Mapping[int, int]) -> bool:
        used = [self.places[slot] for slot in widths]
        if not used:
            return False
        extent = max(p.last for p in used) - min(p.first for p in used)
        return extent > max(2 * sum(widths.values()), 2 * _GRAIN)

    def _rebuild(self, widths: Mapping[int, int]) -> Moves:
        """Start again with these slots alone, with a quarter of room for the next ones."""
        needed = sum(widths.values())
        roomy = -(-(needed + needed // 4) // _GRAIN) * _GRAIN
        resized = not needed <= self.capacity <= 4 * roomy
        if resized:
            self.capacity = roomy
        self.places = {}
        at = 0
        # Powers of two in falling order begin at multiples of themselves.
        for slot in sorted(widths, key=lambda s: (-widths[s], s)):
            self.places[slot] = Place(at, at + widths[slot])
            at += widths[slot]
        self._num_wasteful = 0
        return Moves(resized=resized, moved=True, slots=tuple(sorted(widths)))


class SiteStack:
    """One site's rows: A [capacity, in] and B^T [capacity, out], made when the first adapter needs them."""

    def __init__(self, in_features: int, out_features: int) -> None:
        self._widths = (in_features, out_features)
        self._tensors: tuple[Tensor, Tensor] | None = None

    def rows(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Views of A [R, in] and B [R, out]."""
        assert self._tensors is not None, "a row was written before rows are read"
        a_CI, b_CO = self._tensors
        return a_CI[first:last], b_CO[first:last]

    def reset(self) -> None:
        """Forget every row, and the memory with it: the next write makes it anew."""
        self._tensors = None

    def write(self, place: Place, capacity: int, a_RI: Tensor, b_OR: Tensor) -> None:
        """Put an adapter's factors at the start of its range and zeros in the rest."""
        if self._tensors is None:
            a_CI, b_CO = (a_RI.new_zeros(capacity, width) for width in self._widths)
            self._tensors = a_CI, b_CO
        a_CI, b_CO = self._tensors
        end = place.first + a_RI.shape[0]
        assert end <= place.last <= a_CI.shape[0], "the range holds the adapter's largest rank"
        a_CI[place.first : end] = a_RI
        b_CO[place.first : end] = b_OR.t()
        a_CI[end : place.last] = 0
        b_CO[end : place.last] = 0

    def blank(self, place: Place) -> None:
        """Zero a range whose new owner does not touch this site, so that nothing of the last owner stays."""
        if self._tensors is not None:
            for rows in self._tensors:
                rows[place.first : place.last] = 0
