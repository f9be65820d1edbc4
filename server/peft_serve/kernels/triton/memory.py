"""What the kernels on one device share: memory for factors, the table of where they lie, and a step's tiles."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from peft_serve.kernels.low_rank import Segments
from peft_serve.kernels.triton.entries import Entries
from peft_serve.kernels.triton.slabs import Slabs
from peft_serve.kernels.triton.streams import Streams
from peft_serve.kernels.triton.tiles import Bucket, Tiles, tiles_of

Step = Segments | Bucket
"""The tokens of a step: of this one, or of whatever step a bucket holds."""


class DeviceMemory:
    """Made once for a base, with room for so many slots before the table of entries has to move."""

    def __init__(self, device: torch.device, *, num_slots: int = 256, slab_bytes: int = 4 << 20) -> None:
        self.device = torch.empty(0, device=device).device  # with its number
        self.streams = Streams(self.device)
        self._tables: list[Entries] = []
        self.entries = self.table(num_slots)
        self.slabs = Slabs(self.device, self.streams, slab_bytes=slab_bytes)
        self._tiles: WeakKeyDictionary[Segments, Tiles] = WeakKeyDictionary()

    def table(self, num_slots: int = 0) -> Entries:
        """A further table, for layers of another kind; with room for as many slots as the first, if none are named."""
        made = Entries(self.device, self.streams, num_slots=num_slots or self.entries.num_slots)
        self._tables.append(made)
        return made

    @property
    def num_moves(self) -> int:
        """How often any of the tables went elsewhere, as they were published."""
        return sum(table.num_moves for table in self._tables)

    def reach(self, num_slots: int) -> None:
        """Make room for so many slots in all tables."""
        for table in self._tables:
            table.reach(num_slots)

    def publish(self) -> None:
        """Send what has changed in any of the tables."""
        for table in self._tables:
            table.publish()

    def tiles(self, step: Step) -> Tiles:
        """The tokens of a step, sent to the device once for all layers."""
        if isinstance(step, Bucket):
            return step.tiles
        if step not in self._tiles:
            self._tiles[step] = tiles_of(step, self.device)
        tiles = self._tiles[step]
        self.entries.reach(1 + max(tiles.slots or (0,)))
        return tiles
