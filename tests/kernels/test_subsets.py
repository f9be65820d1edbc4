"""Some tokens of a step: picked, put back, stacked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_serve.kernels.subsets import Chosen, Range, batches_of, subset_of

CPU = torch.device("cpu")


@st.composite
def ranges(draw: st.DrawFn) -> list[Range]:
    """Ranges that do not overlap, in order, with gaps or without."""
    at, found = 0, []
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=6)):
        found.append((at + gap, at + gap + length))
        at += gap + length
    return found


@given(ranges())
def test_a_subset_is_its_tokens(given_ranges: list[Range]) -> None:
    subset = subset_of(given_ranges, CPU)
    own = [token for first, last in given_ranges for token in range(first, last)]
    x = torch.arange(40.0)[:, None] * torch.ones(2)
    part = subset.take(x)
    assert part[:, 0].tolist() == own
    put, added = x.clone(), x.clone()
    changed, columns = x.clone(), x.clone()
    subset.put_(put, -part)
    subset.add_(added, part)
    subset.change_(changed, Tensor.neg_)
    subset.put_columns_(columns, torch.tensor([1]), -part[:, 1:])
    assert put[:, 1].tolist() == [-t if t in own else t for t in range(40)]
    assert added[:, 1].tolist() == [2 * t if t in own else t for t in range(40)]
    assert changed.equal(put)
    assert columns[:, 0].equal(x[:, 0])
    assert columns[:, 1].equal(put[:, 1])


@given(ranges())
def test_batches_are_the_ranges_by_length(given_ranges: list[Range]) -> None:
    x = torch.arange(40.0)[:, None] * torch.ones(2)
    seen = []
    for batch in batches_of(given_ranges, CPU):
        taken = batch.take(x)
        assert taken.shape == (len(batch.members), batch.num_places, 2)
        for member, tokens in zip(batch.members, taken, strict=True):
            assert tokens[:, 0].tolist() == list(range(*given_ranges[member]))
            seen.append(member)
    assert sorted(seen) == list(range(len(given_ranges)))


@pytest.mark.parametrize(("given_ranges", "is_slice"), [([(2, 5), (5, 6)], True), ([(2, 5), (6, 7)], False)])
def test_neighbours_are_a_slice(given_ranges: list[Range], is_slice: bool) -> None:
    subset = subset_of(given_ranges, CPU)
    assert (subset.index_N is None) is is_slice
    x = torch.arange(9)
    assert (subset.take(x).data_ptr() == x[2:].data_ptr()) is is_slice
    seen: list[Tensor] = []
    subset.change_(x, seen.append)
    assert (seen[0].data_ptr() == x[2:].data_ptr()) is is_slice, "a slice is changed where it lies"


def test_tokens_chosen_by_slot_leave_the_others_as_they_are() -> None:
    nothing = float("nan")
    is_own_S1, slot_T = torch.tensor([[False], [False], [True]]), torch.tensor([2, 0, 1, 2])
    chosen = Chosen(is_own_S1, slot_T)
    y_TD, part_TD = torch.ones(4, 2), torch.tensor([[2.0, 3.0], [nothing] * 2, [nothing] * 2, [4.0, 5.0]])
    chosen.add_(y_TD, part_TD)
    assert y_TD.tolist() == [[3, 4], [1, 1], [1, 1], [5, 6]]
    chosen.put_(y_TD, part_TD)
    assert y_TD.tolist() == [[2, 3], [1, 1], [1, 1], [4, 5]]
    assert chosen.take(y_TD) is y_TD


@pytest.mark.parametrize("shape", [(4, 2), (4, 3, 2)])
def test_a_change_of_chosen_tokens_leaves_no_trace_in_the_others(shape: tuple[int, ...]) -> None:
    chosen = Chosen(torch.tensor([[False], [True]]), torch.tensor([1, 0, 0, 1]))
    y_T = torch.ones(shape)
    chosen.change_(y_T, lambda own: own.mul_(3).view(4, -1)[1:3].fill_(float("nan")))
    assert y_T.view(4, -1)[:, 1].tolist() == [3, 1, 1, 3]


def test_columns_of_chosen_tokens_are_exchanged_in_the_dtype_that_is_there() -> None:
    chosen = Chosen(torch.tensor([[False], [True]]), torch.tensor([1, 0]))
    y_TO, part_TC = torch.ones(2, 3, dtype=torch.bfloat16), torch.tensor([[2.0, 4.0], [float("nan")] * 2])
    chosen.put_columns_(y_TO, torch.tensor([2, 0]), part_TC)
    assert y_TO.tolist() == [[4, 1, 2], [1, 1, 1]]
