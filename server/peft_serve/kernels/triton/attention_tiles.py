"""How the rows of a step are cut into the tiles of the attention kernel, and the tables that tell it so.

Owns those tables, on the host and on the device. A tile is a few tokens of one row, with all query heads that share a
key/value head, and a stretch of that row's context. Rows of few tokens have tiles of their own size and their context
is split, so that one long row keeps a whole GPU busy; the parts are merged afterwards. Where a row is cut depends on
that row alone, so its result has the same bits alone and in any batch. Knows no Triton, no pool and no model.

A row's readable positions are counted without gaps: those in front that carry no position, then the others from where a
window begins. `gap` is what lies between.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peft_serve.kernels.triton.attention_numbers import MERGE_SIZE, PART_TAIL, TILE_SIZE

Numbers = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How attention is cut into programs; all powers of two."""

    narrow: int = 16  # queries (tokens x heads of a key/value head) of a tile of rows with few tokens
    wide: int = 64  # of other rows
    split: int = 256  # readable positions of a part, or more where a row would have too many parts
    most_splits: int = 32
    keys: int | None = None  # that a program loads at once; None: as many as there is room for
    align: int = 64  # where a window begins is rounded down to it; `keys` is no more

    def queries(self, group: int, *, is_wide: bool) -> int:
        """Queries of a tile, where `group` query heads share a key/value head."""
        return max(self.wide if is_wide else self.narrow, power_of_two(group))

    def split_of(self, num_positions: int) -> int:
        """Readable positions of each part of a row with so many."""
        split = self.split
        while num_positions > split * self.most_splits:
            split *= 2
        return split


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A row: tokens side by side in the step's line, and the context they read."""

    token: int
    num_tokens: int
    place: int  # context position of the first of them
    stop: int  # context positions there are
    blocks: Sequence[int]
    num_unplaced: int = 0  # of the context: the first ones, which no window hides and which count for no token
    absent: frozenset[int] = frozenset()  # layers at which these are not there


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How many entries each table has. Steps of the same room launch the same programs over the same tensors."""

    narrow: int
    wide: int
    merges: int
    parts: int
    blocks: int
    rows: int = 0  # entries of a layer in the table of what is there; 0: nothing can be absent
    layers: int = 0

    @property
    def num_numbers(self) -> int:
        tiles = (self.narrow + self.wide) * TILE_SIZE
        return tiles + self.merges * MERGE_SIZE + self.blocks + self.rows * self.layers

    def holds(self, least: Room) -> bool:
        """Whether tables of this room can say what those of another one say."""
        here, there = astuple(self), astuple(least)
        return self.layers == least.layers and all(own >= asked for own, asked in zip(here, there, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What the tables say, on the host: int32, one table behind the other."""

    numbers: Tensor
    room: Room
    group: int
    window: int | None
    is_causal: bool

    @property
    def kind(self) -> tuple[Room, int, int | None, bool]:
        """What must be equal for one layout to take another's place on the device."""
        return self.room, self.group, self.window, self.is_causal


class Tables:
    """The tables on the device, one tensor, and the scratch memory of the parts.

    A launch reads nothing else that changes from step to step, and its grid depends on `layout.kind` alone. So a
    captured graph stays valid: `refill` gives it the rows of another step.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self.numbers = _to_device(layout.numbers, device)
        room = layout.room
        sizes = [room.narrow * TILE_SIZE, room.wide * TILE_SIZE, room.merges * MERGE_SIZE, room.blocks]
        parts = torch.split(self.numbers, [*sizes, room.rows * room.layers])
        self.narrow, self.wide, self.merges, self.blocks, here = parts
        self.here = here if room.rows else None
        self._scratch: dict[tuple[int, int], Tensor] = {}

    def refill(self, layout: Layout) -> None:
        """Say what another step's layout of the same kind says, in stream order and in the same memory."""
        assert layout.kind == self.layout.kind, "a layout of another kind needs tables of its own"
        self.layout = layout
        self.numbers.copy_(_pinned(layout.numbers, self.numbers.device), non_blocking=True)

    def scratch(self, num_heads: int, head: int) -> Tensor:
        """Memory for the parts of a launch, float32; the next launch on the stream may use it again."""
        key = (num_heads, head)
        if key not in self._scratch:
            size = max(1, self.layout.room.parts) * num_heads * (head + PART_TAIL)
            self._scratch[key] = torch.empty(size, dtype=torch.float32, device=self.numbers.device)
        return self._scratch[key]


def lay_out(
    readers: Sequence[Reader],
    *,
    group: int,
    sizes: Sizes,
    window: int | None = None,
    is_causal: bool = True,
    num_layers: int = 0,
    room: Room | None = None,
) -> Layout:
    """Cut rows into tiles.

    `group` query heads share a key/value head. Tokens read up to themselves where it `is_causal`, and the whole context
    elsewhere, where no window is served. `num_layers` says for how many layers it is kept what is absent; for 0 nothing
    is, and the kernel is another one. Tables have the `room` that is given, or as much as they need and somewhat more;
    ValueError where they need more than is given.
    """
    assert is_causal or window is None, "a window in both directions is not served"
    cut = _Cut(group, sizes, window, is_causal)
    for row, reader in enumerate(readers):
        cut.add(row, reader)
    narrow, merges, num_parts = _split(cut.narrow, sizes)
    wide = np.array(cut.wide, dtype=np.int32)
    least = Room(
        narrow=rounded(len(narrow)),
        wide=rounded(len(wide)),
        merges=rounded(len(merges)),
        parts=rounded(num_parts),
        blocks=rounded(len(cut.blocks)),
        rows=rounded(len(readers)) if num_layers else 0,
        layers=num_layers,
    )
    room = room or least
    if not room.holds(least):
        raise ValueError(f"rows that need tables of {least} do not fit {room}; take larger ones")
    numbers = np.zeros(room.num_numbers, dtype=np.int32)
    at = 0
    for table, size in (
        (narrow, room.narrow * TILE_SIZE),
        (wide, room.wide * TILE_SIZE),
        (merges, room.merges * MERGE_SIZE),
        (np.frombuffer(cut.blocks, dtype=np.int32), room.blocks),
        (_here(readers, room), room.rows * room.layers),
    ):
        numbers[at : at + table.size] = table.ravel()
        at += size
    host = torch.from_numpy(numbers)
    return Layout(numbers=host, room=room, group=group, window=window, is_causal=is_causal)


Tile = tuple[int, ...]
"""`TILE_SIZE` numbers."""


@dataclass(slots=True)
class _Cut:
    """Tiles of the rows so far; narrow ones are of a whole context."""

    group: int
    sizes: Sizes
    window: int | None
    is_causal: bool
    narrow: list[Tile] = field(default_factory=list)
    wide: list[Tile] = field(default_factory=list)
    blocks: array[int] = field(default_factory=lambda: array("i"))

    def add(self, row: int, reader: Reader) -> None:
        assert reader.num_unplaced <= reader.place or not self.is_causal, "what carries no position is in front"
        if reader.num_tokens <= self.sizes.queries(self.group, is_wide=False) // self.group:
            self.narrow.append(self._tile(row, reader, 0, reader.num_tokens))
        else:
            at_once = self.sizes.queries(self.group, is_wide=True) // self.group
            # The last tokens read most: they begin first.
            for first in reversed(range(0, reader.num_tokens, at_once)):
                num_tokens = min(at_once, reader.num_tokens - first)
                self.wide.append(self._tile(row, reader, first, num_tokens))
        self.blocks.extend(reader.blocks)

    def _tile(self, row: int, reader: Reader, first: int, num_tokens: int) -> Tile:
        place, gap, stop = reader.place + first, 0, reader.stop
        if self.is_causal:
            if self.window is not None:
                hidden = place + 1 - self.window - reader.num_unplaced
                gap = max(0, hidden) // self.sizes.align * self.sizes.align
            stop = place + num_tokens - gap
        where = reader.token + first, num_tokens, place
        return *where, 0, stop, gap, reader.num_unplaced, len(self.blocks), -1, row, 0, 0


def _split(whole: list[Tile], sizes: Sizes) -> tuple[Numbers, Numbers, int]:
    """Tiles of parts of the context [*, TILE_SIZE], merges [*, MERGE_SIZE], and how many parts there are."""
    tiles = np.array(whole, dtype=np.int32).reshape(-1, TILE_SIZE)
    num_tokens, stops = tiles[:, 1], tiles[:, 4]
    splits = np.array([sizes.split_of(stop) for stop in stops.tolist()], dtype=np.int32)
    counts = -(-stops // splits) if whole else stops
    num_parts = np.where(counts > 1, counts * num_tokens, 0)
    first_parts = np.cumsum(num_parts) - num_parts
    of, i = _counted(counts)
    parts = tiles[of]
    parts[:, 3] = i * splits[of]
    parts[:, 4] = np.minimum(stops[of], parts[:, 3] + splits[of])
    parts[:, 8] = np.where(counts[of] > 1, first_parts[of] + i * num_tokens[of], -1)
    of, i = _counted(np.where(counts > 1, num_tokens, 0))
    merges = np.stack((tiles[of, 0] + i, first_parts[of] + i, num_tokens[of], counts[of]), axis=1)
    return parts, merges.astype(np.int32), int(num_parts.sum())


def _counted(counts: Numbers) -> tuple[Numbers, Numbers]:
    """For each of `counts[j]` things: j, and which of them it is."""
    of = np.repeat(np.arange(len(counts)), counts)
    return of, np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)


def _here(readers: Sequence[Reader], room: Room) -> Numbers:
    """[L, R] Whether what carries no position is there."""
    here = np.ones((room.layers, room.rows), dtype=np.int32)
    if room.rows:
        for row, reader in enumerate(readers):
            for layer in reader.absent:
                here[layer, row] = 0
    return here


def rounded(count: int) -> int:
    """Steps of nearly one size share a room; so many entries are made for them."""
    return 0 if count == 0 else max(4, power_of_two(count))


def power_of_two(value: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (value - 1).bit_length()


def _to_device(numbers: Tensor, device: torch.device) -> Tensor:
    return _pinned(numbers, device).to(device, non_blocking=True)


def _pinned(numbers: Tensor, device: torch.device) -> Tensor:
    """Where a copy to a GPU can start from without the host waiting for it."""
    return numbers.pin_memory() if device.type == "cuda" else numbers
