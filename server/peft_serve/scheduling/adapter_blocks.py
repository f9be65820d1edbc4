"""Adapter blocks: the KV blocks that seated adapters have, and what is left of the pool for requests.

An adapter's prefix lies in blocks; where adapters lie among the KV blocks its factors do too, each part in a run of
neighbours. Requests and adapters take from one pool, and each side has something for certain: requests are never given
the last `Limits.num_adapter_blocks`, and adapters end where the slot ledger's bytes do. Owns these blocks; who is
idle, and leaves for whom, is `Residency`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from peft_serve.core import AdapterId, Footprint
from peft_serve.scheduling.blocks import BlockLedger
from peft_serve.scheduling.limits import Limits


class AdapterBlocks:
    """Blocks by adapter."""

    def __init__(self, limits: Limits, blocks: BlockLedger) -> None:
        self._limits = limits
        self._blocks = blocks
        self._prefixes: dict[AdapterId, tuple[int, ...]] = {}
        self._pages: dict[AdapterId, tuple[int, ...]] = {}
        self._num_held = 0

    @property
    def num_held(self) -> int:
        """Blocks that adapters have."""
        return self._num_held

    def num_prefix(self, footprint: Footprint) -> int:
        """Blocks of an adapter's prefix."""
        return self._limits.blocks_for(footprint.num_prefix_tokens)

    def num_wanted(self, footprint: Footprint) -> int:
        """Blocks that an adapter has while it is seated, whoever uses it."""
        return self.num_prefix(footprint) + sum(footprint.runs)

    def prefix(self, adapter: AdapterId) -> tuple[int, ...]:
        return self._prefixes.get(adapter, ())

    def pages(self, adapter: AdapterId) -> tuple[int, ...]:
        return self._pages.get(adapter, ())

    def of(self, adapter: AdapterId) -> tuple[int, ...]:
        """All blocks of an adapter."""
        return self.prefix(adapter) + self.pages(adapter)

    @property
    def most_of_requests(self) -> int:
        """Blocks that all requests together may hold."""
        return self._blocks.capacity - self._limits.num_adapter_blocks

    @property
    def num_left(self) -> int:
        """Blocks that requests may still be given, whoever has them now."""
        return self.most_of_requests - (self._blocks.capacity - self._blocks.num_free - self._num_held)

    def fits(self, footprint: Footprint) -> bool:
        """Whether the adapter's blocks are free."""
        return self._blocks.num_free >= self.num_wanted(footprint) and self._blocks.has_runs(footprint.runs)

    def fits_without(self, footprint: Footprint, leaving: Sequence[AdapterId]) -> bool:
        """Whether its runs would be free if these adapters left."""
        return self._blocks.has_runs(footprint.runs, (b for adapter in leaving for b in self.of(adapter)))

    def could_fit_beside(self, footprint: Footprint, staying: Sequence[AdapterId]) -> bool:
        """Whether its runs would be free if everybody left but these adapters."""
        kept = {block for adapter in staying for block in self.of(adapter)}
        return self._blocks.has_runs(footprint.runs, self._blocks.numbers - kept)

    def take(self, adapter: AdapterId, footprint: Footprint) -> tuple[int, ...]:
        """Take an adapter's blocks, which `fits` saw; gives the first of each of its runs."""
        assert not self.of(adapter), f"adapter {adapter} has its blocks"
        runs = self._blocks.allocate_runs(footprint.runs)
        assert runs is not None, f"no runs for adapter {adapter}: ask fits first"
        prefix = self._blocks.allocate(self.num_prefix(footprint))
        assert prefix is not None, f"no blocks for the prefix of adapter {adapter}: ask fits first"
        firsts, pages = runs
        if prefix:
            self._prefixes[adapter] = prefix
        if pages:
            self._pages[adapter] = pages
        self._num_held += len(prefix) + len(pages)
        return firsts

    def release(self, adapter: AdapterId) -> None:
        """Give back what the adapter has, if it has something."""
        blocks = self.of(adapter)
        self._blocks.release(blocks)
        self._num_held -= len(blocks)
        self._prefixes.pop(adapter, None)
        self._pages.pop(adapter, None)

    def holders(self) -> Iterator[tuple[int, ...]]:
        """The blocks held here, table by table."""
        yield from self._prefixes.values()
        yield from self._pages.values()

    def check(self, seated: Mapping[AdapterId, Footprint]) -> None:
        """Assert that these adapters, and no others, have what they want."""
        assert self._prefixes.keys() | self._pages.keys() <= seated.keys(), "an adapter without a slot has blocks"
        for adapter, footprint in seated.items():
            assert len(self.prefix(adapter)) == self.num_prefix(footprint), "a prefix has the wrong size"
            assert len(self.pages(adapter)) == sum(footprint.runs), "an adapter lies in too few blocks, or too many"
        assert self._num_held == sum(map(len, self.holders())), "the blocks of adapters do not add up"
        assert self.num_left >= 0, "requests hold blocks that are kept for adapters"
