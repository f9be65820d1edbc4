"""What kernels are told of the adapters in slots: a few numbers for each slot and layer, in one table on the device.

The table stays where it is while its contents change, so that kernels which were captured in a CUDA graph read what
holds now. Changes are collected on the host and sent by `publish`, one copy for each slot, in the order of the current
stream: kernels asked for earlier read what held then. Knows not what the numbers mean; all of them are 0 where a slot
has nothing.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from peft_serve.kernels.triton.streams import Streams

NUM_FIELDS: Final = 4


class Entries:
    """[S, L, 4] int64 by slot and layer. One thread at a time."""

    def __init__(self, device: torch.device, streams: Streams, *, num_slots: int) -> None:
        self._device = device
        self._streams = streams
        self._num_layers = 0
        self._host_SLF = torch.zeros(num_slots, 0, NUM_FIELDS, dtype=torch.int64)
        self._table_SLF: Tensor | None = None
        self._changed: set[int] = set()
        self._writers: set[torch.cuda.Stream] = set()
        self.num_moves = 0  # how often the table went elsewhere: a CUDA graph of before reads what is gone

    @property
    def num_slots(self) -> int:
        return len(self._host_SLF)

    @property
    def num_layers(self) -> int:
        return self._num_layers

    @property
    def table(self) -> Tensor:
        """On the device, as it was published."""
        assert self._table_SLF is not None, "published before it is read"
        return self._table_SLF

    def add_layer(self) -> int:
        """A further layer, and its number."""
        self._num_layers += 1
        self._table_SLF = None
        return self._num_layers - 1

    def renew(self) -> None:
        """Have the table count as moved, for whoever captured it in a way that no longer serves."""
        self._table_SLF = None

    def write(self, slot: int, layer: int, numbers: tuple[int, int, int, int]) -> None:
        """From the next `publish` on. What the numbers lead to is written on the current stream."""
        self.reach(slot + 1)
        self._host_SLF[slot, layer] = torch.tensor(numbers)
        self._changed.add(slot)
        here = self._streams.current()
        if here is not None:
            self._writers.add(here)

    @torch.inference_mode(False)  # what is made here is written to in either mode
    def reach(self, num_slots: int) -> None:
        """Make room for so many slots."""
        missing = (num_slots - len(self._host_SLF), self._num_layers - self._host_SLF.shape[1])
        if max(missing) <= 0:
            return
        room = 2 * num_slots if missing[0] > 0 else len(self._host_SLF)
        larger_SLF = torch.zeros(room, self._num_layers, NUM_FIELDS, dtype=torch.int64)
        old = self._host_SLF
        larger_SLF[: old.shape[0], : old.shape[1]] = old
        self._host_SLF, self._table_SLF = larger_SLF, None

    @torch.inference_mode(False)
    def publish(self) -> None:
        """Send what has changed; the current stream then waits for the streams that wrote what it leads to."""
        if self._table_SLF is None:
            self.reach(0)
            self._table_SLF = sent(self._host_SLF, self._device)
            self.num_moves += 1
        else:
            for slot in sorted(self._changed):
                self._table_SLF[slot].copy_(sent(self._host_SLF[slot], self._device))
        self._changed.clear()
        if self._writers:
            self._streams.wait_for(self._writers)
            self._writers.clear()


class Room:
    """Room for so much of something as the largest adapter so far has of it, up to a power of two.

    Launches that are captured have it, whoever they serve later. An adapter that needs more has them captured anew.
    """

    def __init__(self, entries: Entries, least: int) -> None:
        self._entries = entries
        self.size = least

    def hold(self, num: int) -> None:
        """There is an adapter with so much."""
        if num > self.size:
            self.size = 1 << (num - 1).bit_length()
            self._entries.renew()


def sent(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, by way of pinned memory, so that the host does not wait for it."""
    if device.type != "cuda":
        return host.clone()
    return host.pin_memory().to(device, non_blocking=True)
