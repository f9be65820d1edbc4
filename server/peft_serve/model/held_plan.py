"""The attention of rows that decode, in tables that stay where they are: what a captured step reads of it.

The tables of one plan, made for the rows of a first step and filled with those of others. How much room they have is
fixed when they are made; see `parts_for`. Knows no Triton and no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from peft_serve.kernels.triton.attention_tiles import Layout, Reader, Room, Sizes, Tables, lay_out, rounded
from peft_serve.model.pools import KVPool
from peft_serve.model.ragged import Plan, Span

_GROWTH: Final = 4  # from one room to the next: idle programs end at once, and a room more is a graph more


class HeldPlan:
    """Tables for each kind of layer that has asked: by query heads of a key/value head, and by window."""

    def __init__(self, plan: Plan, pool: KVPool, sizes: Sizes, *, parts: int, is_causal: bool) -> None:
        """The plan's rows are those there is room for."""
        self.plan = plan
        self._readers = tuple(readers_of(plan.spans, pool.block_size))
        self._pool, self._sizes, self._is_causal = pool, sizes, is_causal
        self._room = _room(len(self._readers), parts, sizes, pool)
        self._tables: dict[tuple[int, int | None], Tables] = {}

    def tables(self, group: int, window: int | None) -> Tables:
        """For layers of one kind; made when the first of them asks."""
        key = (group, window)
        if key not in self._tables:
            self._tables[key] = Tables(self._layout(*key), self._pool.device)
        return self._tables[key]

    def fill(self, spans: Sequence[Span]) -> None:
        """From now on, in the order of the current stream, these are the rows, as many as the plan has."""
        assert len(spans) == len(self.plan.spans), "a row of the step, or an idle one, for each row of the plan"
        self._readers = tuple(readers_of(spans, self._pool.block_size))
        for key, tables in self._tables.items():
            tables.refill(self._layout(*key))

    def _layout(self, group: int, window: int | None) -> Layout:
        return lay_out(
            self._readers,
            group=group,
            sizes=self._sizes,
            window=window,
            is_causal=self._is_causal,
            num_layers=self._pool.shape.num_layers,
            room=self._room,
        )


def placed(spans: Sequence[Span]) -> Iterator[tuple[int, Span]]:
    """Each row, and the place of its first token in the step's line."""
    at = 0
    for span in spans:
        yield at, span
        at += span.num_tokens


def readers_of(spans: Sequence[Span], block_size: int) -> Iterator[Reader]:
    """Rows that read blocks."""
    for at, span in placed(spans):
        stop = span.num_source or span.stop
        yield Reader(
            token=at,
            num_tokens=span.num_tokens,
            place=span.start,
            stop=stop,
            blocks=span.blocks[: -(-stop // block_size)],
            num_unplaced=span.num_unplaced,
            absent=span.absent,
        )


def parts_for(stops: Sequence[int], num_rows: int, *, sizes: Sizes, block_size: int) -> int:
    """Parts of a context that there has to be room for, on average over `num_rows` rows: a power of four.

    `stops` are the context positions of each row; rows beyond them have one.
    """
    num_idle = num_rows - len(stops)
    assert num_idle >= 0, "rows fit"
    tiles = num_idle + sum(min(sizes.most_splits, -(-stop // sizes.split)) for stop in stops)
    blocks = num_idle + sum(-(-stop // block_size) for stop in stops)
    parts = 1
    while num_rows * min(parts, sizes.most_splits) < tiles or num_rows * _blocks(parts, sizes, block_size) < blocks:
        parts *= _GROWTH
    return parts


def _room(num_rows: int, parts: int, sizes: Sizes, pool: KVPool) -> Room:
    """For as many tiles and blocks. Where a row has one part on average, each has one, and nothing is merged."""
    tiles = num_rows * min(parts, sizes.most_splits)
    return Room(
        narrow=rounded(tiles),
        wide=0,
        merges=rounded(num_rows) if parts > 1 else 0,
        parts=rounded(tiles) if parts > 1 else 0,
        blocks=rounded(num_rows * _blocks(parts, sizes, pool.block_size)),
        rows=rounded(num_rows) if pool.shape.num_layers else 0,
        layers=pool.shape.num_layers,
    )


def _blocks(parts: int, sizes: Sizes, block_size: int) -> int:
    return max(1, parts * sizes.split // block_size)
