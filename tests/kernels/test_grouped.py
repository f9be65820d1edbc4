"""Every grouped op against the slow truth, over ranks, dtypes and popularity."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peft_serve.kernels import grouped, reference
from peft_serve.kernels.grouped import Piece

IN, OUT, VOCAB, TOKENS = 24, 40, 50, 20
RANKS = ([1], [8], [16, 4, 1, 8], [3, 64])
POPULARITY = ["distinct", "uniform", "zipf", "identical", "skewed"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float64: 1e-12}


def runs_of(popularity: str, num_tokens: int) -> list[tuple[int, int]]:
    """(slot, tokens), slots ascending; slot 0 is the base."""
    if popularity == "identical":
        return [(1, num_tokens)]
    if popularity == "distinct":
        return [(slot, 1) for slot in range(num_tokens)]
    if popularity == "uniform":
        shares = [1.0] * math.ceil(math.sqrt(num_tokens))
    elif popularity == "zipf":
        shares = [1 / k for k in range(1, 8)]
    else:
        shares = [1.5**k for k in range(6)]
    counts = [int(num_tokens * share / sum(shares)) for share in shares]
    counts[0] += num_tokens - sum(counts)
    return list(enumerate(counts))


class Stack:
    """Random adapters of the given ranks side by side, with a range of somebody who is not in the step."""

    def __init__(self, runs: list[tuple[int, int]], ranks: list[int], width: int, dtype: torch.dtype) -> None:
        rng = torch.Generator().manual_seed(1)
        self.factors: dict[int, tuple[Tensor, Tensor]] = {}
        self.pieces: list[Piece] = []
        a_rows, b_rows, token, row = [], [], 0, 0
        for slot, num_tokens in runs:
            rank = ranks[slot % len(ranks)]
            if slot:
                a = (torch.randn(rank, width, generator=rng) / math.sqrt(width)).to(dtype)
                b = (torch.randn(OUT, rank, generator=rng) / math.sqrt(rank)).to(dtype)
                self.factors[slot] = (a, b)
                self.pieces.append((token, token + num_tokens, row, row + rank))
                a_rows += [a, torch.full((2, width), 3.0, dtype=dtype)]
                b_rows += [b.T, torch.full((2, OUT), 3.0, dtype=dtype)]
                row += rank + 2
            token += num_tokens
        self.a, self.b = torch.cat(a_rows), torch.cat(b_rows)
        self.parts = grouped.parts_of(self.a, self.b, self.pieces)
        self.foreign = torch.ones(token, row, dtype=torch.bool)
        for first, last, first_row, last_row in self.pieces:
            self.foreign[first:last, first_row:last_row] = False


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=TOLERANCE[got.dtype] * 4)


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_low_rank(popularity: str, ranks: list[int], dtype: torch.dtype) -> None:
    runs = runs_of(popularity, TOKENS)
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, IN, generator=rng).to(dtype)
    y = torch.randn(TOKENS, OUT, generator=rng).to(dtype)
    stack = Stack(runs, ranks, IN, dtype)
    factors = {slot: (a.double(), b.double()) for slot, (a, b) in stack.factors.items()}
    want = reference.low_rank(y.double(), x.double(), runs, factors)
    close(grouped.add_low_rank_(y.clone(), x, stack.a, stack.b, stack.foreign), want)
    close(grouped.add_low_rank_runs_(y.clone(), x, stack.parts), want)


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_low_rank_lookup(popularity: str, ranks: list[int], dtype: torch.dtype) -> None:
    runs = runs_of(popularity, TOKENS)
    rng = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCAB, (TOKENS,), generator=rng)
    y = torch.randn(TOKENS, OUT, generator=rng).to(dtype)
    stack = Stack(runs, ranks, VOCAB, dtype)
    factors = {slot: (a.double(), b.double()) for slot, (a, b) in stack.factors.items()}
    want = reference.low_rank_lookup(y.double(), ids, runs, factors)
    close(grouped.add_low_rank_lookup_(y.clone(), ids, stack.a, stack.b, stack.foreign), want)
    close(grouped.add_low_rank_lookup_runs_(y.clone(), ids, stack.parts), want)


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_vectors(popularity: str, dtype: torch.dtype) -> None:
    runs = runs_of(popularity, TOKENS)
    rng = torch.Generator().manual_seed(4)
    y = torch.randn(TOKENS, OUT, generator=rng).to(dtype)
    ids = torch.randint(0, VOCAB, (TOKENS,), generator=rng)
    num_slots = 1 + max(slot for slot, _ in runs)
    slots = torch.repeat_interleave(torch.tensor([s for s, _ in runs]), torch.tensor([n for _, n in runs]))
    has = [slot for slot in range(1, num_slots) if slot % 3 != 2]

    def table(width: int, neutral: float) -> tuple[Tensor, dict[int, Tensor]]:
        rows = torch.full((num_slots, width), neutral, dtype=dtype)
        for slot in has:
            rows[slot] = torch.randn(width, generator=rng).to(dtype)
        return rows, {slot: rows[slot] for slot in has}

    rows, vectors = table(OUT, 1.0)
    want = reference.scale(y, runs, vectors)
    assert torch.equal(grouped.scaled_by_token(y, rows, slots), want)
    assert torch.equal(grouped.scale_by_token_(y.clone(), rows, slots), want)
    rows, vectors = table(VOCAB, 1.0)
    want = reference.scale_by_id(y, ids, runs, vectors)
    assert torch.equal(grouped.scale_by_id_(y.clone(), rows, slots, ids), want)
    rows, vectors = table(OUT, 0.0)
    assert torch.equal(grouped.add_by_token_(y.clone(), rows, slots), reference.shift(y, runs, vectors))


def test_an_overflow_stays_with_its_adapter() -> None:
    runs = [(1, 2), (2, 2)]
    stack = Stack(runs, [4], IN, torch.float32)
    x = torch.randn(4, IN, generator=torch.Generator().manual_seed(5))
    y = torch.zeros(4, OUT)
    calm = grouped.add_low_rank_(y.clone(), x, stack.a, stack.b, stack.foreign)
    first, last = stack.pieces[0][2:]
    stack.a[first:last] = 3e38  # x A^T is infinite for every token of the batch
    loud = grouped.add_low_rank_(y.clone(), x, stack.a, stack.b, stack.foreign)
    assert not torch.isfinite(loud[:2]).any()
    assert torch.equal(loud[2:], calm[2:])


def test_a_broken_token_stays_with_its_row() -> None:
    runs = [(1, 2), (2, 2)]
    stack = Stack(runs, [4], IN, torch.float32)
    x = torch.randn(4, IN, generator=torch.Generator().manual_seed(5))
    y = torch.zeros(4, OUT)
    calm = grouped.add_low_rank_(y.clone(), x, stack.a, stack.b, stack.foreign)
    x[0] = float("nan")
    loud = grouped.add_low_rank_(y.clone(), x, stack.a, stack.b, stack.foreign)
    assert loud[0].isnan().all()
    assert torch.equal(loud[1:], calm[1:])


def test_only_the_first_argument_changes() -> None:
    runs = [(0, 2), (1, 3), (2, 4)]
    stack = Stack(runs, [4], IN, torch.float32)
    x, y = torch.randn(9, IN), torch.randn(9, OUT)
    kept = [t.clone() for t in (x, stack.a, stack.b)]
    got = grouped.add_low_rank_(y, x, stack.a, stack.b, stack.foreign)
    assert got is y
    assert all(torch.equal(t, k) for t, k in zip((x, stack.a, stack.b), kept, strict=True))
