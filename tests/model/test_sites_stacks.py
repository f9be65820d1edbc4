"""The ledger of the hot stacks under any order of use, and the memory it describes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_serve.model.stacks import Moves, Place, SiteStack, StackLayout

WIDTHS = {slot: (8, 16, 3, 64, 1)[slot % 5] for slot in range(1, 20)}


def test_first_use_makes_room_for_a_little_more() -> None:
    layout = StackLayout()
    moves = layout.use({3: 8, 1: 16})
    assert moves == Moves(resized=True, moved=True, slots=(1, 3))
    assert layout.places == {1: Place(0, 16), 3: Place(16, 24)}
    assert layout.capacity == 32


def test_a_hot_adapter_is_written_once() -> None:
    layout = StackLayout()
    layout.use({1: 8})
    assert layout.use({1: 8}) == Moves()
    assert layout.use({1: 8, 2: 8}) == Moves(slots=(2,))
    assert layout.use({2: 8}) == Moves()
    assert layout.use({1: 8}) == Moves()


def test_the_longest_unused_gives_way_first() -> None:
    layout = StackLayout()
    for slot in (1, 2, 3, 4):
        layout.use({slot: 8})
    assert layout.capacity == 32
    layout.use({1: 8})
    layout.use({5: 8})
    assert set(layout.places) == {3, 4, 1, 5}
    assert layout.places[5] == Place(8, 16)


def test_what_does_not_fit_rebuilds() -> None:
    layout = StackLayout()
    layout.use({1: 16})
    assert layout.use({1: 16, 2: 64}).resized
    assert layout.capacity == 128
    assert set(layout.places) == {1, 2}


def test_scattered_adapters_are_brought_together_after_a_while() -> None:
    layout = StackLayout(patience=3)
    layout.use(dict.fromkeys(range(1, 9), 16))
    moves = [layout.use({1: 16, 8: 16}) for _ in range(4)]
    assert moves[:3] == [Moves()] * 3
    assert moves[3] == Moves(resized=False, moved=True, slots=(1, 8))
    assert layout.places == {1: Place(0, 16), 8: Place(16, 32)}


def test_memory_is_given_back_after_a_crowd() -> None:
    layout = StackLayout(patience=2)
    layout.use({1: 8, **dict.fromkeys(range(2, 17), 64), 17: 128})
    assert layout.capacity > 1000
    for _ in range(4):
        layout.use({1: 8, 17: 128})
    assert layout.capacity == 192


@given(st.lists(st.one_of(st.sets(st.integers(1, 19), min_size=1, max_size=8), st.integers(1, 19)), max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_order_of_use(acts: list[set[int] | int]) -> None:
    """Whoever is used has exactly its rows, and its place moves only when somebody is told."""
    layout = StackLayout(patience=2)
    told: dict[int, Place] = {}
    for act in acts:
        if isinstance(act, int):
            layout.forget(act)
            told.pop(act, None)
            continue
        moves = layout.use({slot: WIDTHS[slot] for slot in act})
        if moves.moved:
            told = {}
        told.update({slot: layout.places[slot] for slot in moves.slots})
        layout.check()
        for slot in act:
            place = layout.places[slot]
            assert place.last - place.first == WIDTHS[slot]
            assert told[slot] == place
        needed = sum(WIDTHS[slot] for slot in act)
        assert layout.capacity >= needed


def test_rows_are_the_factors_and_zeros() -> None:
    stack = SiteStack(3, 5)
    a, b = torch.randn(2, 3), torch.randn(5, 2)
    stack.write(Place(4, 8), 16, torch.ones(4, 3), torch.ones(5, 4))
    stack.write(Place(4, 8), 16, a, b)
    a_rows, b_rows = stack.rows(0, 16)
    want_a, want_b = torch.zeros(16, 3), torch.zeros(16, 5)
    want_a[4:6], want_b[4:6] = a, b.T
    assert torch.equal(a_rows, want_a)
    assert torch.equal(b_rows, want_b)


def test_a_new_owner_that_does_not_come_here_leaves_nothing_of_the_old() -> None:
    stack = SiteStack(3, 5)
    stack.blank(Place(0, 4))  # no memory yet: nothing to do
    stack.write(Place(0, 4), 8, torch.ones(4, 3), torch.ones(5, 4))
    stack.blank(Place(0, 4))
    assert not any(rows.any() for rows in stack.rows(0, 8))
