"""Grids against the slow truth: mixed ranks, idle groups, uneven runs, tokens of nobody in between."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_serve.kernels import reference
from peft_serve.kernels.grids import add_low_rank_grids_, grids_of
from peft_serve.kernels.grouped import Piece
from peft_serve.model.routing import Run, Span, Way
from peft_serve.model.stacks import Place, StackLayout, width_of

IN, OUT = 12, 20
CPU = torch.device("cpu")


def widths_at(layout: StackLayout, ranks: dict[int, int]) -> dict[int, Place]:
    layout.use({slot: width_of(rank) for slot, rank in ranks.items()})
    return layout.places


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=9),
    seed=st.integers(0, 99),
    mixed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=150, deadline=None)
def test_grids_equal_the_truth(counts: list[int], seed: int, mixed: bool, dtype: torch.dtype) -> None:
    """`counts[slot]` tokens for each slot; slot 0 is the base, and every fourth slot does not touch the site."""
    rng = random.Random(seed)
    ranks = {slot: rng.choice([1, 8, 9, 16, 30]) if mixed else 8 for slot in range(1, len(counts))}
    layout = StackLayout()
    layout.use({slot: width_of(rng.choice([8, 16])) for slot in range(50, 50 + rng.randrange(4))})  # used before
    places = widths_at(layout, ranks)
    generator = torch.Generator().manual_seed(seed)
    a = torch.full((layout.capacity, IN), 7.0, dtype=dtype)
    b = torch.full((layout.capacity, OUT), 7.0, dtype=dtype)
    factors, pieces, token = {}, [], 0
    for slot, count in enumerate(counts):
        if slot and slot % 4:
            place, rank = places[slot], ranks[slot]
            a[place.first : place.last], b[place.first : place.last] = 0, 0
            a[place.first : place.first + rank] = torch.randn(rank, IN, generator=generator, dtype=dtype)
            b[place.first : place.first + rank] = torch.randn(rank, OUT, generator=generator, dtype=dtype)
            factors[slot] = (a[place.first : place.first + rank], b[place.first : place.first + rank].T)
            if count:
                pieces.append((token, token + count, place.first, place.last))
        token += count
    x = torch.randn(max(token, 1), IN, generator=generator, dtype=dtype)
    y = torch.randn(max(token, 1), OUT, generator=generator, dtype=dtype)
    if not pieces:
        return
    grids = grids_of(pieces, CPU)
    if grids is None:
        return
    runs = list(enumerate(counts))
    want = reference.low_rank(y.clone(), x, runs, factors)
    got = add_low_rank_grids_(y.clone(), x, [(grid, grid.rows(a), grid.rows(b)) for grid in grids])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_an_overflowing_adapter_leaves_its_neighbours_alone() -> None:
    a, b = torch.ones(16, IN), torch.ones(16, OUT)
    a[8:] = 1e38
    pieces: list[Piece] = [(0, 3, 0, 8), (3, 4, 8, 16)]
    grids = grids_of(pieces, CPU)
    assert grids is not None
    y = add_low_rank_grids_(torch.zeros(4, OUT), torch.ones(4, IN), [(g, g.rows(a), g.rows(b)) for g in grids])
    assert torch.equal(y[:3], torch.full((3, OUT), 8.0 * IN))
    assert not y[3].isfinite().any()


def test_several_runs_of_one_adapter_share_its_group() -> None:
    """As when base tokens lie between: rows of an adapter that acts from some token on."""
    pieces: list[Piece] = [(1, 3, 0, 8), (4, 5, 0, 8), (5, 7, 8, 16), (9, 10, 0, 8)]
    a, b = torch.randn(16, IN), torch.randn(16, OUT)
    x, y = torch.randn(11, IN), torch.randn(11, OUT)
    grids = grids_of(pieces, CPU)
    assert grids is not None
    assert [(grid.num_groups, grid.num_places) for grid in grids] == [(2, 4)]
    want = y.clone()
    for first, last, low, high in pieces:
        want[first:last] += x[first:last] @ a[low:high].T @ b[low:high]
    got = add_low_rank_grids_(y.clone(), x, [(grid, grid.rows(a), grid.rows(b)) for grid in grids])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_even_runs_need_no_picking() -> None:
    grids = grids_of([(2, 4, 8, 16), (4, 6, 16, 24)], CPU)
    assert grids is not None
    (grid,) = grids
    assert (grid.take_P, grid.give_N, grid.own_N) == (None, None, None)
    assert (grid.first_token, grid.last_token, grid.num_groups, grid.num_places) == (2, 6, 2, 2)


@pytest.mark.parametrize(
    "pieces",
    [
        [(0, 1, 0, 8), (1, 2, 12, 20)],  # not on one grid
        [(0, 1, 0, 8), (1, 2, 800, 808)],  # a hundred groups for two adapters
    ],
)
def test_what_lies_badly_is_no_grid(pieces: list[Piece]) -> None:
    assert grids_of(pieces, CPU) is None


def test_widths_are_powers_of_two_and_lie_at_multiples_of_themselves() -> None:
    assert [width_of(rank) for rank in (1, 8, 9, 16, 17, 64, 65)] == [8, 8, 16, 16, 32, 64, 128]
    layout, rng = StackLayout(), random.Random(5)
    for _ in range(300):
        layout.use({rng.randrange(30): width_of(rng.choice([4, 8, 16, 40])) for _ in range(rng.randrange(1, 6))})
        layout.check()
        assert all(place.first % (place.last - place.first) == 0 for place in layout.places.values())


@pytest.mark.parametrize(
    ("runs", "width", "features", "way"),
    [
        ([(slot, 2 * slot, 2 * slot + 2) for slot in range(8)], 8, 1280, Way.GRIDS),  # decode
        ([(0, 0, 512), (1, 512, 513), (2, 513, 514)], 8, 1792, Way.RUNS),  # a prompt beside decoding rows
        ([(0, 0, 1)], 8, 1280, Way.MASKED),  # one token: nothing to group
    ],
)
def test_the_cheapest_way_is_taken(runs: list[tuple[int, int, int]], width: int, features: int, way: Way) -> None:
    placed = [(Run(s, first, last), Place(width * s, width * s + width)) for s, first, last in runs]
    span = Span(runs[-1][2], placed, CPU)
    assert span.way(features) is way
