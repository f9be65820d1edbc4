"""The tables of the kernels for terms as a captured step reads them; see `capture`."""

from __future__ import annotations

from peft_serve.kernels.low_rank import Segments
from peft_serve.kernels.triton.low_rank import LowRankKernel
from peft_serve.kernels.triton.tiles import Bucket


class HeldTiles:
    """The tiles of whatever step was told last."""

    def __init__(self, kernel: LowRankKernel, bucket: Bucket) -> None:
        self._kernel = kernel
        self._bucket = bucket

    @property
    def segments(self) -> Segments:
        return self._bucket

    def fill(self, segments: Segments) -> None:
        self._kernel.fill(self._bucket, segments)


class HeldEntries:
    """The tables of entries of the kernel and of those that share its memory, and tiles for steps that are captured,
    with room for ranks up to `max_rank`."""

    def __init__(self, kernel: LowRankKernel, *, max_rank: int) -> None:
        self._kernel = kernel
        self._max_rank = max_rank

    @property
    def num_moves(self) -> int:
        memory = self._kernel.memory
        memory.publish()
        return memory.num_moves

    def fits(self, segments: Segments) -> bool:
        self._kernel.memory.reach(segments.num_slots)
        return self._kernel.fits(segments, self._max_rank)

    def held(self, num_tokens: int) -> HeldTiles:
        return HeldTiles(self._kernel, self._kernel.bucket(num_tokens, max_rank=self._max_rank))
