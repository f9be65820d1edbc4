"""Blocks: who holds which piece of the KV cache, and which pieces can be read again.

Owns the books of the KV blocks: a free list, a reference count a block, and the *label* of a block whose content
is known. A labelled block that nobody holds is free, and is found by its label until it is given to somebody else;
the one that was let go first is given first. Block 0 is padding and is never given. Adapters may lie in blocks too:
what is larger than one wants a run of neighbours. Knows no tensors, no requests and no meaning of a label: whoever
holds a block holds one reference to it and releases it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from itertools import islice

from peft_serve.core import PADDING_BLOCK


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """A second table over the same positions, and the (from, to) copies that make it true."""

    blocks: tuple[int, ...]
    copies: tuple[tuple[int, int], ...] = ()


class BlockLedger:
    """Reference-counted blocks 1..num_blocks-1, whose numbers are those times `spacing`.

    A pool whose blocks lie in many parts counts the parts, and finds a block by the number of its first one.
    """

    def __init__(self, *, num_blocks: int, block_size: int, spacing: int = 1) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ValueError(
                f"a KV cache of {num_blocks} blocks of {block_size} positions holds nothing: "
                "it needs two blocks (one is padding) of at least one position"
            )
        self._block_size = block_size
        self._spacing = spacing
        numbers = range(0, num_blocks * spacing, spacing)
        self._free = list(reversed(numbers[1:]))
        self._references = dict.fromkeys(numbers, 0)
        self._labels: dict[int, bytes] = {}
        self._labelled: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # labelled, held by nobody, first to be given first

    @property
    def num_blocks(self) -> int:
        """All blocks, padding included."""
        return len(self._references)

    @property
    def numbers(self) -> Set[int]:
        """Every block that can be given."""
        return self._references.keys() - {PADDING_BLOCK}

    @property
    def capacity(self) -> int:
        """Blocks that can be given."""
        return len(self._references) - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, labelled or not."""
        return len(self._free) + len(self._idle)

    @property
    def num_labelled(self) -> int:
        return len(self._labels)

    @property
    def usage(self) -> float:
        """Share of the capacity that is held, from 0 to 1."""
        return 1.0 - self.num_free / self.capacity

    def is_held(self, block: int) -> bool:
        return self._references[block] > 0

    def allocate(self, num_blocks: int) -> tuple[int, ...] | None:
        """Fresh blocks, one reference each; None (and nothing changed) when there are not so many."""
        if num_blocks > self.num_free:
            return None
        blocks = tuple(self._free.pop() if self._free else self._unlabelled() for _ in range(num_blocks))
        for block in blocks:
            self._references[block] = 1
        return blocks

    def has_runs(self, lengths: Sequence[int], others: Iterable[int] = ()) -> bool:
        """Whether there are free runs of so many neighbouring blocks each, or would be if `others` were free too."""
        if max(lengths, default=0) <= 1:
            return len(lengths) <= self.num_free + len(set(others))
        return _placed(lengths, {*self._free, *self._idle, *others}, self._spacing) is not None

    def allocate_runs(self, lengths: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Fresh runs of neighbouring blocks, one reference each: their first blocks, and all of them.

        They are taken from where single blocks are given last. None (and nothing changed) when there are none.
        """
        if max(lengths, default=0) > 1:
            found = _placed(lengths, {*self._free, *self._idle}, self._spacing)
        else:
            num_plain = min(len(lengths), len(self._free))
            rest = tuple(islice(self._idle, len(lengths) - num_plain))
            found = (*self._free[:num_plain], *rest) if num_plain + len(rest) == len(lengths) else None
        if found is None:
            return None
        starts = zip(found, lengths, strict=True)
        blocks = tuple(first + i * self._spacing for first, length in starts for i in range(length))
        taken = set(blocks)
        for block in taken.intersection(self._idle):
            self._forget(block)
        self._free = [block for block in self._free if block not in taken]
        self._references.update(dict.fromkeys(blocks, 1))
        return found, blocks

    def share(self, blocks: Sequence[int]) -> None:
        """One more reference to each block; a labelled one may have had none."""
        for block in blocks:
            assert self._references[block] > 0 or block in self._idle, f"block {block} is shared but nobody holds it"
            self._idle.pop(block, None)
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each block; the last one frees it.

        Of labelled blocks the last of the table will be given away first: the ones before it are of use without it.
        """
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} is released but nobody holds it"
            self._references[block] -= 1
            if self._references[block] > 0:
                continue
            if block in self._labels:
                self._idle[block] = None
            else:
                self._free.append(block)

    def label(self, block: int, label: bytes) -> None:
        """Say what a held block contains from now on, so that `find` gives it. One block a label: others stay plain."""
        assert self._references[block] > 0, f"block {block} is labelled but nobody holds it"
        assert block not in self._labels, f"block {block} has a label: its content does not change"
        if label not in self._labelled:
            self._labels[block] = label
            self._labelled[label] = block

    def unlabel(self, blocks: Iterable[int]) -> None:
        """Nobody is to find these held blocks again: what they contain is not what their labels say."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} loses its label but nobody holds it"
            label = self._labels.pop(block, None)
            if label is not None:
                del self._labelled[label]

    def find(self, labels: Iterable[bytes]) -> tuple[int, ...]:
        """The blocks with these labels, up to the first that there is none for. Nobody holds them for it: `share`."""
        blocks = []
        for label in labels:
            block = self._labelled.get(label)
            if block is None:
                break
            blocks.append(block)
        return tuple(blocks)

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
        held = {block for block, count in self._references.items() if count > 0}
        free = {*self._free, *self._idle}
        assert self.num_free == len(free), "a block is free twice"
        assert not held & free, "a block is free and held"
        assert len(held) + len(free) == self.capacity, "a block is lost"
        assert self._idle.keys() <= self._labels.keys(), "an idle block has no label"
        assert not self._labels.keys() & set(self._free), "a labelled block is among the plain ones"
        assert {label: block for block, label in self._labels.items()} == self._labelled, "labels and index differ"
        if holders is not None:
            counts = Counter(block for blocks in holders for block in blocks)
            assert counts == {block: self._references[block] for block in held}, "a reference has no holder"

    def _unlabelled(self) -> int:
        """The labelled block that was let go first, without its label."""
        block = next(iter(self._idle))
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        """A labelled block that nobody holds is about to be given to somebody else."""
        del self._idle[block]
        del self._labelled[self._labels.pop(block)]


def _placed(lengths: Sequence[int], free: Set[int], spacing: int) -> tuple[int, ...] | None:
    """Where runs of free blocks can begin, the longest at the highest numbers; None where there is no such room."""
    left: list[list[int]] = []  # [first, length] of the stretches of free blocks, the highest first
    for block in sorted(free, reverse=True):
        if left and left[-1][0] == block + spacing:
            left[-1] = [block, left[-1][1] + 1]
        else:
            left.append([block, 1])
    firsts = [0] * len(lengths)
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        stretch = next((one for one in left if one[1] >= lengths[place]), None)
        if stretch is None:
            return None
        stretch[1] -= lengths[place]
        firsts[place] = stretch[0] + stretch[1] * spacing
    return tuple(firsts)
