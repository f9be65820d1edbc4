"""Memory for the factors of adapters: slabs of equal pieces, each slab for pieces of one size.

A factor lies in a piece of its own length, whatever the ranks of its neighbours, and never moves, so that a kernel may
be told its address. Installing and dropping an adapter asks the device for memory only when no slab has room.

Kernels run long after the host has asked for them. A piece is given back on the stream whose kernels read it, and
taken on the stream that writes it; where these are two, the second waits for all that the first was asked to do by
then. The host waits for neither. Knows no adapter and no kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from peft_serve.kernels.triton.streams import Streams

_ALIGNMENT: Final = 128  # bytes: a piece begins where a line of the device's cache does
_MOST_PIECES: Final = 64  # of a slab


@dataclass(slots=True, eq=False)
class _Slab:
    """Memory for some pieces of one size."""

    memory: Tensor  # uint8
    piece_bytes: int
    free: list[int]
    num_pieces: int
    readers: set[torch.cuda.Stream] = field(default_factory=set)  # on which it was had, or pieces were given back


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A part of a slab, from `first` on."""

    slab: _Slab
    first: int
    num_bytes: int

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that lies `offset` bytes behind the beginning."""
        length = torch.Size(shape).numel() * dtype.itemsize
        assert offset + length <= self.num_bytes, "a view lies inside its piece"
        first = self.first + offset
        return self.slab.memory[first : first + length].view(dtype).view(shape)


class Slabs:
    """The pieces on one device. One thread at a time."""

    def __init__(self, device: torch.device, streams: Streams, *, slab_bytes: int = 4 << 20) -> None:
        self._device = device
        self._streams = streams
        self._slab_bytes = slab_bytes
        self._by_size: dict[int, list[_Slab]] = {}
        self.num_used = 0  # bytes of the pieces that are taken
        self.num_held = 0  # bytes of all slabs

    def take(self, num_bytes: int) -> Piece:
        """A piece to be written on the current stream. Where memory runs out torch says so, and nothing has changed."""
        assert num_bytes > 0, "a piece holds something"
        size = aligned(num_bytes)
        slabs = self._by_size.get(size, [])
        slab = next((slab for slab in slabs if slab.free), None)
        if slab is None:
            slab = self._made(size)
        self._streams.wait_for(slab.readers)
        self.num_used += size
        return Piece(slab, slab.free.pop() * size, num_bytes)

    @contextmanager
    def taken(self, num_bytes: int) -> Iterator[Piece]:
        """A piece that is given back where what is done with it fails, for want of memory above all."""
        piece = self.take(num_bytes)
        try:
            yield piece
        except BaseException:
            self.give_back(piece)
            raise

    def give_back(self, piece: Piece) -> None:
        """Nothing that is asked of the device from now on reads the piece. The current stream is the one that did."""
        slab = piece.slab
        number = piece.first // slab.piece_bytes
        assert number not in slab.free, "a piece is given back once"
        slab.free.append(number)
        self.num_used -= slab.piece_bytes
        self._note_reader(slab)
        if len(slab.free) == slab.num_pieces:
            self._let_go(slab)

    def _made(self, size: int) -> _Slab:
        num_pieces = max(1, min(_MOST_PIECES, self._slab_bytes // size))
        with torch.inference_mode(False):  # whoever asks for it first: it is written to in either mode
            memory = torch.empty(num_pieces * size, dtype=torch.uint8, device=self._device)
        slab = _Slab(memory, size, list(reversed(range(num_pieces))), num_pieces)
        self._note_reader(slab)  # who had the memory before may still be read on this stream
        self._by_size.setdefault(size, []).append(slab)
        self.num_held += memory.nbytes
        return slab

    def _let_go(self, slab: _Slab) -> None:
        """Torch's allocator keeps the memory until the readers are done with it."""
        for stream in slab.readers:
            self._streams.outlives(slab.memory, stream)
        self._by_size[slab.piece_bytes].remove(slab)
        self.num_held -= slab.memory.nbytes

    def _note_reader(self, slab: _Slab) -> None:
        here = self._streams.current()
        if here is not None:
            slab.readers.add(here)


def aligned(num_bytes: int) -> int:
    """So many bytes, up to where the next piece may begin."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
