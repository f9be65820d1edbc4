"""A step's tokens as kernels go through them: tiles of tokens, each of one adapter and side by side.

Knows no adapter beyond its slot, and no layer: a step's tiles serve all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from peft_serve.kernels.low_rank import Segments
from peft_serve.kernels.triton.entries import sent

FEW: Final = 16
"""Tokens of a tile where segments are short, as in decode: the least that a tensor core multiplies."""

MANY: Final = 64
"""The same where some segment is long, as in prefill."""

_LONG: Final = 64  # tokens of a segment from which on tiles hold many


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Tiles:
    """`table_N3`, int32 on the device: the slot of each tile, its first token, and how many they are, which may be 0.

    `slots` are those of the tiles, or None where the tiles change and may name any.
    """

    table_N3: Tensor
    height: int
    num_tokens: int
    slots: frozenset[int] | None

    def __len__(self) -> int:
        return len(self.table_N3)


def tiles_of(segments: Segments, device: torch.device) -> Tiles:
    """The tiles of a step; their height follows from the longest segment."""
    longest = max((last - first for _, first, last in segments.each), default=0)
    height = MANY if longest > _LONG else FEW
    table_N3 = torch.tensor(list(_cut(segments.each, height)), dtype=torch.int32).view(-1, 3)
    return Tiles(
        table_N3=sent(table_N3, device),
        height=height,
        num_tokens=segments.num_tokens,
        slots=frozenset(slot for slot, _, _ in segments.each),
    )


class Bucket(Segments):
    """Tiles for any step of up to so many tokens, which stay where they are: what a CUDA graph reads at each replay.

    `max_rank` bounds the ranks of the adapters that the steps may have; kernels are given room for it once. As segments
    it says nothing of the step: who has to know more than its tiles cannot be captured.
    """

    def __init__(self, num_tokens: int, device: torch.device, *, max_rank: int) -> None:
        super().__init__((), num_tokens)
        self.max_rank = max_rank
        with torch.inference_mode(False):  # it is written to in either mode
            table_N3 = torch.zeros(num_tokens, 3, dtype=torch.int32, device=device)  # a step's tiles are not more
        self.tiles = Tiles(table_N3=table_N3, height=FEW, num_tokens=num_tokens, slots=None)

    def fill(self, segments: Segments) -> None:
        """From now on, in the order of the current stream, the tiles are those of this step."""
        tiles = self.tiles
        if segments.num_tokens > tiles.num_tokens:
            raise ValueError(
                f"{segments.num_tokens} tokens do not fit a bucket of {tiles.num_tokens}; take a larger one"
            )
        host_N3 = torch.zeros(len(tiles), 3, dtype=torch.int32)
        rows = list(_cut(segments.each, tiles.height))
        if rows:
            host_N3[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
        tiles.table_N3.copy_(sent(host_N3, tiles.table_N3.device))


def _cut(each: Iterable[tuple[int, int, int]], height: int) -> Iterator[tuple[int, int, int]]:
    for slot, first, last in each:
        for at in range(first, last, height):
            yield slot, at, min(height, last - at)
