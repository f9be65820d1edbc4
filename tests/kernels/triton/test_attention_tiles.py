"""Tiles cover what each token reads once, and a row is cut the same way whoever its neighbours are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_serve.kernels.triton.attention_numbers import MERGE_SIZE, TILE_SIZE
from peft_serve.kernels.triton.attention_tiles import (
    Layout,
    Reader,
    Room,
    Sizes,
    Tables,
    lay_out,
)

CPU = torch.device("cpu")
SIZES = Sizes(narrow=4, wide=16, split=16, most_splits=4, align=16)
Row = tuple[int, int, int]  # tokens, context in front, of it without positions

ROWS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 200), st.integers(0, 20)), min_size=1, max_size=6)


def readers(rows: list[Row]) -> list[Reader]:
    made, token = [], 0
    for number, (num_tokens, place, num_unplaced) in enumerate(rows):
        stop = place + num_tokens
        made.append(
            Reader(
                token=token,
                num_tokens=num_tokens,
                place=place,
                stop=stop,
                blocks=[100 * number + i for i in range(-(-stop // 8))],
                num_unplaced=min(num_unplaced, place),
            )
        )
        token += num_tokens
    return made


def tiles_of(layout: Layout) -> list[list[int]]:
    tables = Tables(layout, CPU)
    return [tile for tile in torch.cat((tables.narrow, tables.wide)).view(-1, TILE_SIZE).tolist() if tile[1]]


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from([1, 3, 16]), st.sampled_from([None, 1, 5, 30]))
def test_every_token_reads_its_positions_once(rows: list[Row], group: int, window: int | None) -> None:
    made = readers(rows)
    layout = lay_out(made, group=group, sizes=SIZES, window=window)
    blocks, read = Tables(layout, CPU).blocks.tolist(), {}
    for token, num_tokens, place, start, stop, gap, unplaced, table, _, row, _, _ in tiles_of(layout):
        for i in range(num_tokens):
            for at in range(start, stop):
                context = at if at < unplaced else at + gap
                is_near = window is None or context > place + i - window
                if at < unplaced or (context <= place + i and is_near):
                    read.setdefault(token + i, []).append(context)
                    assert blocks[table + context // 8] == 100 * row + context // 8
    for reader in made:
        for i in range(reader.num_tokens):
            first = 0 if window is None else max(0, reader.place + i + 1 - window)
            own = range(max(first, reader.num_unplaced), reader.place + i + 1)
            assert sorted(read[reader.token + i]) == [*range(reader.num_unplaced), *own]


@settings(max_examples=40, deadline=None)
@given(ROWS, st.sampled_from([1, 3]))
def test_parts_of_a_token_are_its_merge_and_share_no_memory(rows: list[Row], group: int) -> None:
    layout = lay_out(readers(rows), group=group, sizes=SIZES)
    written = [tile[8] + i for tile in tiles_of(layout) if tile[8] >= 0 for i in range(tile[1])]
    merges = [merge for merge in Tables(layout, CPU).merges.view(-1, MERGE_SIZE).tolist() if merge[3]]
    merged = [first + step * i for _, first, step, count in merges for i in range(count)]
    assert sorted(written) == sorted(merged) == list(range(len(written)))
    assert len(written) <= layout.room.parts
    assert all(1 < count <= SIZES.most_splits for *_, count in merges)
    whole = [tile[0] + i for tile in tiles_of(layout) if tile[8] < 0 for i in range(tile[1])]
    assert sorted([*whole, *(token for token, *_ in merges)]) == list(range(sum(tokens for tokens, *_ in rows)))


@settings(max_examples=30, deadline=None)
@given(ROWS, st.sampled_from([1, 3]), st.sampled_from([None, 30]))
def test_a_row_is_cut_as_if_it_were_alone(rows: list[Row], group: int, window: int | None) -> None:
    def cuts(rows: list[Row], own: int) -> list[list[int]]:
        made = readers(rows)
        tiles = tiles_of(lay_out(made, group=group, sizes=SIZES, window=window))
        return [[t[0] - made[own].token, *t[1:7], t[8] >= 0] for t in tiles if t[9] == own]

    for own, row in enumerate(rows):
        assert cuts(rows, own) == cuts([row], 0)


def test_a_long_context_has_longer_parts_not_more_of_them() -> None:
    assert [SIZES.split_of(n) for n in (1, 64, 65, 128, 129)] == [16, 16, 32, 32, 64]


def test_steps_of_nearly_one_size_share_a_room() -> None:
    def layout(rows: list[Row]) -> Layout:
        return lay_out(readers(rows), group=3, sizes=SIZES)

    assert layout([(1, 40, 0)] * 3).kind == layout([(1, 37, 0)] * 4).kind
    tables = Tables(layout([(1, 40, 0)] * 3), CPU)
    assert layout([(30, 40, 0)]).kind != tables.layout.kind
    with pytest.raises(AssertionError, match="of its own"):
        tables.refill(layout([(30, 40, 0)]))


def test_what_is_absent_is_said_by_layer_and_row() -> None:
    rows = [
        Reader(token=0, num_tokens=1, place=5, stop=6, blocks=[1], num_unplaced=2, absent=frozenset({1})),
        Reader(token=1, num_tokens=1, place=5, stop=6, blocks=[2]),
    ]
    layout = lay_out(rows, group=1, sizes=SIZES, num_layers=2)
    here = Tables(layout, CPU).here
    assert here is not None
    assert here.view(2, -1)[:, :2].tolist() == [[1, 1], [0, 1]]
    assert lay_out(rows[1:], group=1, sizes=SIZES, num_layers=2).kind == layout.kind, "one graph serves both"
    assert layout.room == Room(narrow=4, wide=0, merges=0, parts=0, blocks=4, rows=4, layers=2)
