"""Which positions an intervention edits, against the library's own gather and scatter, in any division into parts."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_serve.model.extents import Extent, Extents, Unit

CPU = torch.device("cpu")
Edit = tuple[str, int]
"""(who made it, from the state of which position)"""

small = st.integers(0, 7)


def library(length: int, num_first: int, num_last: int) -> list[Edit]:
    """`ReftModule._gather_adapted_states` and `_scatter_adapted_states` of adapters 1.3, on names."""
    states: list[Edit] = [("base", place) for place in range(length)]
    first, last = list(range(min(num_first, length))), list(range(length - min(num_last, length), length))
    adapted = [("first", place) for place in first] + [("last", place) for place in last]
    if num_first:
        for target, edit in zip(first, adapted[:num_first], strict=False):
            states[target] = edit
    if num_last:
        for target, edit in zip(last, adapted[-num_last:], strict=False):
            states[target] = edit
    return states


def ours(extents: list[Extent], num_tokens: int, num_first: int, num_last: int, slot: int = 1) -> list[Edit]:
    """The states of a stream, by places in it."""
    states: list[Edit] = [("base", place) for place in range(num_tokens)]
    seen: set[int] = set()
    each = Extents(tuple(extents), CPU).moves(slot, num_first, num_last)
    for unit, moves in zip(Unit, each, strict=True):
        for source, target in zip(moves.sources, moves.targets, strict=True):
            assert target not in seen
            seen.add(target)
            states[target] = (unit.name.lower(), source)
    return states


@given(length=st.integers(1, 9), num_first=small, num_last=st.integers(0, 20))
def test_a_whole_row_is_what_the_library_makes_of_it(length: int, num_first: int, num_last: int) -> None:
    row = Extent(slot=1, at=0, num_tokens=length, first=0, length=length, is_whole=True)
    assert ours([row], length, num_first, num_last) == library(length, num_first, num_last)


@given(length=st.integers(1, 9), num_first=small, num_last=small)
def test_a_prompt_is_what_the_library_makes_of_it_unless_it_is_shorter_than_the_last_positions(
    length: int, num_first: int, num_last: int
) -> None:
    row = Extent.of_prompt(1, 0, length, first=0, length=length)
    found, wanted = ours([row], length, num_first, num_last), library(length, num_first, num_last)
    if num_last <= length or not num_first or length == 1:
        assert found == wanted
    else:
        assert [place for _, place in found] == list(range(length))  # every result at its own position
        assert [who for who, _ in found] == ["first"] * min(num_first, length) + ["last"] * max(0, length - num_first)


@given(
    length=st.integers(1, 9),
    num_new=st.integers(0, 4),
    cuts=st.sets(st.integers(1, 12)),
    num_first=small,
    num_last=st.integers(0, 12),
)
def test_parts_of_a_row_give_what_one_pass_gives(
    length: int, num_new: int, cuts: set[int], num_first: int, num_last: int
) -> None:
    total = length + num_new
    whole = ours([Extent.of_prompt(1, 0, total, first=0, length=length)], total, num_first, num_last)
    bounds = [0, *sorted(cut for cut in cuts if cut < total), total]
    parts: list[Edit] = []
    for start, stop in pairwise(bounds):
        extent = Extent.of_prompt(1, 0, stop - start, first=start, length=length)
        parts += [(who, place + start) for who, place in ours([extent], stop - start, num_first, num_last)]
    assert parts == whole
    one = library(1, num_first, num_last)[0][0]
    assert [who for who, _ in whole[length:]] == [one] * num_new


def test_virtual_tokens_other_rows_and_padding_are_left_alone() -> None:
    extents = [
        Extent(slot=1, at=0, num_tokens=5, first=-2, length=3, is_whole=True),  # two virtual tokens, then three
        Extent(slot=1, at=7, num_tokens=2, first=0, length=2, is_whole=True),  # behind two of padding
        Extent(slot=2, at=9, num_tokens=1, first=0, length=1, is_whole=True),
    ]
    found = ours(extents, 10, num_first=1, num_last=1)
    who = ["base", "base", "first", "base", "last", "base", "base", "first", "last", "base"]
    assert [name for name, _ in found] == who
    assert [name for name, _ in ours(extents, 10, 1, 0, slot=2)] == ["base"] * 9 + ["first"]


def test_generated_tokens_are_alike_wherever_they_stand() -> None:
    assert Extent.of_prompt(1, 0, 1, first=5, length=5) == Extent.of_prompt(1, 0, 1, first=99, length=7)
    assert Extent.of_prompt(1, 0, 1, first=4, length=5) != Extent.of_prompt(1, 0, 1, first=3, length=5)
