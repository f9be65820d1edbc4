"""Mixers and maps against the matrices they stand for, in float32 and float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_serve.kernels import bases, maps
from peft_serve.kernels.bases import Gained, add_bases_, add_transposed_bases_
from peft_serve.kernels.mixing import mixed_by_blocks, mixed_in_pairs
from peft_serve.kernels.subsets import subset_of

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
SIDES = st.integers(1, 4)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@DTYPES
@pytest.mark.parametrize(("runs", "places", "blocks", "side"), [(1, 5, 3, 4), (4, 1, 2, 8), (3, 3, 1, 6), (2, 2, 6, 1)])
def test_blocks(runs: int, places: int, blocks: int, side: int, dtype: torch.dtype) -> None:
    x, own = normal(runs, places, blocks * side, dtype=dtype), normal(runs, blocks, side, side, dtype=dtype)
    want = torch.stack([x[g] @ torch.block_diag(*own[g]) for g in range(runs)])
    torch.testing.assert_close(mixed_by_blocks(x, own), want)


@DTYPES
@pytest.mark.parametrize(("features", "group"), [(8, 2), (8, 4), (8, 8)])
def test_pairs(features: int, group: int, dtype: torch.dtype) -> None:
    y, own, other = (normal(3, features, dtype=dtype) + k for k in range(3))
    half = group // 2
    partner = [f + half if f % group < half else f - half for f in range(features)]
    torch.testing.assert_close(mixed_in_pairs(y, own, other, group), own * y + other * y[:, partner])


@given(p=SIDES, q=SIDES, r=SIDES, s=SIDES, tokens=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_kronecker(p: int, q: int, r: int, s: int, tokens: int) -> None:
    """Either order of the two products."""
    left, right = normal(p, q), normal(r, s)
    x, y = normal(tokens, q * s), normal(tokens, p * r)
    full = torch.kron(left, right)
    want = y + x @ full.T
    got = y.clone()
    maps.add_kronecker_(got, x, left, right)
    torch.testing.assert_close(got, want)
    ids = torch.arange(tokens) % (q * s)
    got = y.clone()
    maps.add_kronecker_lookup_(got, ids, left, right)
    torch.testing.assert_close(got, y + full.T[ids])


@given(entries=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=12), tokens=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_sparse(entries: list[tuple[int, int]], tokens: int) -> None:
    """Entries at one place add up; rows and columns may be empty, and so may the whole."""
    rows = torch.tensor([row for row, _ in entries], dtype=torch.int64)
    columns = torch.tensor([column for _, column in entries], dtype=torch.int64)
    values = normal(len(entries)) if entries else torch.zeros(0, dtype=torch.float64)
    full = torch.zeros(4, 5, dtype=torch.float64).index_put((rows, columns), values, accumulate=True)
    x, y = normal(tokens, 5), normal(tokens, 4)
    got = y.clone()
    maps.add_sparse_(got, x, maps.compressed(rows, columns, values, num_rows=4))
    torch.testing.assert_close(got, y + x @ full.T)
    ids = torch.arange(tokens)
    got = y.clone()
    by_column = maps.compressed(columns, rows, values, num_rows=5)
    maps.add_sparse_lookup_(got, ids, by_column, most=maps.most_in_a_row(by_column))
    torch.testing.assert_close(got, y + full.T[ids])


@DTYPES
@pytest.mark.parametrize("chosen", [[(0, 3), (3, 4)], [(0, 1), (2, 4)]])
def test_rescaled(chosen: list[tuple[int, int]], dtype: torch.dtype) -> None:
    subset = subset_of(chosen, CPU)
    tokens = [t for first, last in chosen for t in range(first, last)]
    a, b = normal(3, 6, dtype=dtype), normal(7, 3, dtype=dtype)
    inner, outer = normal(len(tokens), 3, dtype=dtype), normal(len(tokens), 7, dtype=dtype)
    x, y = normal(5, 6, dtype=dtype), normal(5, 7, dtype=dtype)
    want = y.clone()
    want[tokens] += outer * ((inner * (x[tokens] @ a.T)) @ b.T)
    got = y.clone()
    maps.add_rescaled_(got, x, subset, a, b, inner, outer, is_lookup=False)
    torch.testing.assert_close(got, want)
    ids = torch.tensor([4, 0, 5, 1, 1])
    want = y.clone()
    want[tokens] += outer * ((inner * a.T[ids[tokens]]) @ b.T)
    got = y.clone()
    maps.add_rescaled_(got, ids, subset, a, b, inner, outer, is_lookup=True)
    torch.testing.assert_close(got, want)


@DTYPES
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("counts", [[1], [3], [1, 1, 1], [2, 3, 1, 1, 5, 1], [4, 4], [1, 9, 1]])
def test_bases(counts: list[int], is_transposed: bool, dtype: torch.dtype) -> None:
    """Runs longer than the rank and shorter ones, between tokens of nobody, of factors larger than the site."""
    num_ranks, num_gains, small, large = 2, 4, 7, 11
    a, b = normal(num_ranks, small + 2, dtype=dtype), normal(large + 3, num_ranks * num_gains + 1, dtype=dtype)
    a, b = a[:, :small], b[:large, : num_ranks * num_gains]
    num_in, num_out = (large, small) if is_transposed else (small, large)
    num_tokens = 2 * len(counts) + sum(counts)
    x, y = normal(num_tokens, num_in, dtype=dtype), normal(num_tokens, num_out, dtype=dtype)
    want, chosen, runs, weights, at = y.clone(), [], [], [], 0
    for turn, count in enumerate(counts):
        at += turn % 3
        first = runs[-1].last if runs else 0
        w, gains = normal(num_ranks, num_gains, dtype=dtype) + turn, normal(num_gains, small, dtype=dtype) - turn
        chosen.append((at, at + count))
        runs.append(Gained(first, first + count, gains))
        weights += [w.flatten()] * count
        matrix = b @ torch.stack([w[p, q] * a[p] * gains[q] for p in range(num_ranks) for q in range(num_gains)])
        here = slice(at, at + count)
        want[here] += x[here] @ (matrix if is_transposed else matrix.T)
        at += count
    got, subset = y.clone(), subset_of(chosen, CPU)
    add_ = add_transposed_bases_ if is_transposed else add_bases_
    add_(got, x, subset, a, b, torch.stack(weights), runs)
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype is torch.float32 else {}
    torch.testing.assert_close(got, want, **tolerance)


def test_products_with_gains_stay_within_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short runs are taken together as far as the bound allows; one on its own is taken whatever it needs."""
    gains = torch.ones(4, 5)
    runs = [Gained(n, n + 1, gains) for n in range(5)]
    runs += [Gained(5, 9, gains), Gained(9, 10, gains), Gained(10, 12, gains)]
    monkeypatch.setattr(bases, "_MAX_GAINED", 40)
    assert [[run.first for run in group] for group in bases._groups(runs, 2)] == [[0, 1], [2, 3], [4], [5], [9], [10]]
    monkeypatch.setattr(bases, "_MAX_GAINED", 1)
    assert [len(group) for group in bases._groups(runs, 9)] == [1] * len(runs)
