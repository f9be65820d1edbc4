"""Memory for factors: pieces of their own length, given again only behind those who read them."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from tests.kernels.triton.interpreter import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

from peft_serve.kernels.triton.entries import Entries
from peft_serve.kernels.triton.slabs import Piece, Slabs
from peft_serve.kernels.triton.streams import Streams

HERE = torch.device(DEVICE)


class Named(Streams):
    """Streams that are names, and what they were told: (who waits, for whom), and whose end memory outlives."""

    def __init__(self) -> None:
        self.here = "compute"
        self.waits: list[tuple[str, str]] = []
        self.outlived: list[str] = []

    def current(self) -> str:  # type: ignore[override]
        return self.here

    def wait_for(self, others: Iterable[str]) -> None:  # type: ignore[override]
        self.waits += [(self.here, other) for other in sorted(others) if other != self.here]

    def outlives(self, memory: Tensor, stream: str) -> None:  # type: ignore[override]
        self.outlived.append(stream)


def test_pieces_lie_apart_and_hold_what_was_put_there() -> None:
    slabs = Slabs(HERE, Streams(HERE), slab_bytes=1024)
    with torch.inference_mode():
        pieces = [slabs.take(size) for size in (100, 300, 300, 5000, 100, 300, 300, 1)]
    for number, piece in enumerate(pieces):
        piece.view(0, (piece.num_bytes,), torch.uint8).fill_(number)
    for number, piece in enumerate(pieces):
        assert piece.view(0, (piece.num_bytes,), torch.uint8).unique().tolist() == [number]
        assert piece.view(0, (1,), torch.uint8).data_ptr() % 16 == 0
    assert slabs.num_used == 3 * 128 + 4 * 384 + 5120
    assert slabs.num_held == 1024 + 2 * 768 + 5120, "slabs are full but for the last of each size"
    for piece in pieces:
        slabs.give_back(piece)
    assert (slabs.num_used, slabs.num_held) == (0, 0)


def test_a_piece_is_written_behind_those_who_read_it() -> None:
    streams = Named()
    slabs = Slabs(HERE, streams, slab_bytes=1024)
    first, second = slabs.take(500), slabs.take(500)
    slabs.give_back(first)
    again = slabs.take(500)
    assert (streams.waits, again.first) == ([], first.first), "one stream keeps its own order"
    slabs.give_back(again)
    streams.here = "copy"
    copied = slabs.take(500)
    assert (streams.waits, copied.first) == ([("copy", "compute")], first.first)
    slabs.give_back(copied)
    streams.here = "compute"
    slabs.give_back(second)
    assert sorted(streams.outlived) == ["compute", "copy"], "the slab is let go, and torch knows who reads it"


def test_what_entries_lead_to_is_read_behind_those_who_wrote_it() -> None:
    streams = Named()
    entries = Entries(HERE, streams, num_slots=2)
    layer = entries.add_layer()
    streams.here = "copy"
    entries.write(5, layer, (1, 2, 3, 4))
    streams.here = "compute"
    entries.publish()
    assert streams.waits == [("compute", "copy")]
    assert entries.table[5, layer].tolist() == [1, 2, 3, 4]
    entries.write(5, layer, (0, 0, 0, 0))
    assert entries.table[5, layer].tolist() == [1, 2, 3, 4], "not before it is published"
    entries.publish()
    entries.publish()
    assert entries.table[5, layer].tolist() == [0, 0, 0, 0]
    assert (streams.waits, entries.num_moves) == ([("compute", "copy")], 1)


def test_a_piece_is_given_back_once() -> None:
    slabs = Slabs(HERE, Streams(HERE))
    piece: Piece = slabs.take(8)
    slabs.take(8)
    slabs.give_back(piece)
    with pytest.raises(AssertionError, match="given back once"):
        slabs.give_back(piece)


def test_a_piece_whose_filling_fails_is_given_back() -> None:
    slabs = Slabs(HERE, Streams(HERE))
    with pytest.raises(MemoryError), slabs.taken(8):
        raise MemoryError
    assert (slabs.num_used, slabs.num_held) == (0, 0)
    with slabs.taken(8) as piece:
        assert piece.num_bytes == 8
    assert slabs.num_used == 128
