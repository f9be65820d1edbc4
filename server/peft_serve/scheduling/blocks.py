"""Blocks: who holds which piece of the KV cache.

Owns the books of the KV blocks: a free list and a reference count a block. Block 0 is padding and is never
given. Knows no tensors and no requests: whoever holds a block holds one reference to it and releases it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peft_serve.core import PADDING_BLOCK


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """A second table over the same positions, and the (from, to) copies that make it true."""

    blocks: tuple[int, ...]
    copies: tuple[tuple[int, int], ...] = ()


class BlockLedger:
    """Reference-counted blocks 1..num_blocks-1."""

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ValueError(
                f"a KV cache of {num_blocks} blocks of {block_size} positions holds nothing: "
                "it needs two blocks (one is padding) of at least one position"
            )
        self._block_size = block_size
        self._free = list(range(num_blocks - 1, PADDING_BLOCK, -1))
        self._references = [0] * num_blocks

    @property
    def num_blocks(self) -> int:
        """All blocks, padding included."""
        return len(self._references)

    @property
    def capacity(self) -> int:
        """Blocks that can be given."""
        return len(self._references) - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the capacity that is held, from 0 to 1."""
        return 1.0 - len(self._free) / self.capacity

    def allocate(self, num_blocks: int) -> tuple[int, ...] | None:
        """Fresh blocks, one reference each; None (and nothing changed) when there are not so many."""
        if num_blocks > len(self._free):
            return None
        blocks = tuple(self._free.pop() for _ in range(num_blocks))
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """One more reference to each block."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is shared but nobody holds it"
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each block; the last one frees it."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is released but nobody holds it"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)

    def fork(self, table: Sequence[int], num_positions: int) -> Fork | None:
        """A table that reads the same first `num_positions` and may be written from there on.

        Full blocks are shared; a partly filled last block is replaced by a fresh one and a copy. None (and
        nothing changed) when there is no fresh block.
        """
        num_full, rest = divmod(num_positions, self._block_size)
        assert num_full + bool(rest) <= len(table), f"{len(table)} blocks do not hold {num_positions} positions"
        shared = tuple(table[:num_full])
        fresh = self.allocate(1 if rest else 0)
        if fresh is None:
            return None
        self.share(shared)
        copies = tuple((table[num_full], block) for block in fresh)
        return Fork(blocks=shared + fresh, copies=copies)

    def check(self, holders: Iterable[Sequence[int]] | None = None) -> None:
        """Assert that the books are consistent, and equal to what `holders` say they hold, if given."""
        assert self._references[PADDING_BLOCK] == 0, "the padding block was given away"
        held = {block for block, count in enumerate(self._references) if count > 0}
        assert len(self._free) == len(set(self._free)), "a block is free twice"
        assert not held & set(self._free), "a block is free and held"
        assert len(held) + len(self._free) == self.capacity, "a block is lost"
        if holders is not None:
            counts = Counter(block for blocks in holders for block in blocks)
            assert counts == {block: self._references[block] for block in held}, "a reference has no holder"
