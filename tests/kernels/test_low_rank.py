"""Low-rank terms by our own kernel: right for any ranks and segments, and the same bits for a token in any step."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from peft_serve.kernels.low_rank import LayerFactors, LowRankKernel, Segments
from peft_serve.kernels.native import NativeCode, NativeError, cache_folder, find_compiler

needs_compiler = pytest.mark.skipif(find_compiler(os.environ) is None, reason="this machine has no C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]
RANKS = {1: 1, 2: 8, 3: 3, 5: 16, 6: 13, 7: 64, 9: 4, 10: 24}  # by slot; slots 4 and 8 have nothing here
SIZES = [(1, 1), (7, 5), (16, 8), (75, 70), (33, 641), (257, 96), (640, 330), (96, 128), (2090, 40)]
Row = tuple[int, int, int]


@pytest.fixture(scope="module", params=[False, True], ids=["vectors", "tiles"])
def kernel(request: pytest.FixtureRequest) -> LowRankKernel:
    made = LowRankKernel(NativeCode(find_compiler(os.environ), cache_folder(os.environ)), tiles=request.param)
    if made.has_tiles != request.param:
        pytest.skip("this CPU has no matrix unit")
    return made


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class _Layer:
    """A layer with its adapters, and the exact result beside it."""

    def __init__(self, kernel: LowRankKernel, num_in: int, num_out: int, dtype: torch.dtype) -> None:
        self._rng = torch.Generator().manual_seed(num_in + num_out)
        self.dtype = dtype
        self.sizes = num_in, num_out
        self.factors: LayerFactors = kernel.layer(num_in, num_out, dtype)
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}
        for slot, rank in RANKS.items():
            self.put(slot, rank)

    def random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._rng).to(self.dtype)

    def put(self, slot: int, rank: int) -> None:
        num_in, num_out = self.sizes
        self._pairs[slot] = self.random(rank, num_in), self.random(num_out, rank)
        self.factors.put(slot, *self._pairs[slot])

    def exact(self, y_TO: Tensor, x_TI: Tensor, rows: list[Row]) -> Tensor:
        exact_TO = y_TO.double()
        for slot, first, last in rows:
            if slot in self._pairs:
                a_RI, b_OR = (factor.double() for factor in self._pairs[slot])
                exact_TO[first:last] += x_TI[first:last].double() @ a_RI.t() @ b_OR.t()
        return exact_TO


def _steps() -> list[tuple[list[Row], int]]:
    """Decode rows, mixed runs, prefills; with tokens of the base between them, and adapters that have nothing here."""
    return [
        ([(2, 0, 1)], 1),
        ([(slot, slot, slot + 1) for slot in range(1, 10)], 11),
        ([(4, 0, 3), (8, 3, 9)], 9),
        ([(1, 1, 3), (2, 3, 9), (3, 9, 13), (5, 14, 21), (4, 21, 22), (9, 22, 27)], 30),
        ([(7, 0, 70), (2, 70, 71), (6, 71, 131), (2, 140, 142)], 150),
    ]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_in", "num_out"), SIZES)
def test_every_token_gets_the_term_of_its_adapter(
    kernel: LowRankKernel, num_in: int, num_out: int, dtype: torch.dtype, num_threads: int
) -> None:
    layer = _Layer(kernel, num_in, num_out, dtype)
    for rows, num_tokens in _steps():
        x_TI, y_TO = layer.random(num_tokens, num_in), layer.random(num_tokens, num_out)
        exact_TO, base_TO = layer.exact(y_TO, x_TI, rows), y_TO.clone()
        layer.factors.op(Segments(rows, num_tokens))(y_TO, x_TI)
        # one rounding of the exact result, beside that of the sums
        room = (2.0**-8 if dtype == torch.bfloat16 else 0) * exact_TO.abs() + 1e-5 * (num_in**0.5 * 8)
        assert ((y_TO - exact_TO).abs() <= room).all()
        own = {token for slot, first, last in rows if slot in RANKS for token in range(first, last)}
        for token in set(range(num_tokens)) - own:
            assert torch.equal(y_TO[token], base_TO[token])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_in", "num_out"), [(7, 5), (16, 8), (257, 96), (330, 641), (2090, 40)])
def test_a_token_has_the_same_bits_in_any_step(
    kernel: LowRankKernel, num_in: int, num_out: int, dtype: torch.dtype, num_threads: int
) -> None:
    layer = _Layer(kernel, num_in, num_out, dtype)
    x_TI, y_TO = layer.random(101, num_in), layer.random(101, num_out)
    for slot in (1, 7, 6):
        alone_TO = y_TO.clone()
        torch.set_num_threads(1)
        one = layer.factors.op(Segments([(slot, 0, 1)], 1))
        for token in range(101):
            one(alone_TO[token], x_TI[token])
        torch.set_num_threads(num_threads)
        for count in (*range(1, 27), 64, 101):
            rows = [(slot, 0, count)]
            if count < 101:  # somebody else behind it
                rows.append((5, count, 101))
            together_TO = y_TO.clone()
            layer.factors.op(Segments(rows, 101))(together_TO, x_TI)
            assert torch.equal(together_TO[:count], alone_TO[:count]), (slot, count)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_beside_any_others(
    kernel: LowRankKernel, dtype: torch.dtype, num_threads: int
) -> None:
    layer = _Layer(kernel, 130, 90, dtype)
    x_TI, y_TO = layer.random(40, 130), layer.random(40, 90)
    alone_TO = {slot: y_TO.clone() for slot in RANKS}
    for slot, its_TO in alone_TO.items():
        for token in range(40):
            layer.factors.op(Segments([(slot, 0, 1)], 1))(its_TO[token], x_TI[token])
    rng = random.Random(5)
    for _ in range(60):
        rows, at = [], rng.randrange(3)
        while at < 40:
            end = min(40, at + rng.choice((1, 1, 2, 3, 4, 5, 6, 9, 17)))
            rows.append((rng.choice(list(RANKS)), at, end))
            at = end + rng.choice((0, 0, 1, 5))
        together_TO, expected_TO = y_TO.clone(), y_TO.clone()
        layer.factors.op(Segments(rows, 40))(together_TO, x_TI)
        for slot, first, last in rows:
            expected_TO[first:last] = alone_TO[slot][first:last]
        assert torch.equal(together_TO, expected_TO), rows


@needs_compiler
def test_segments_come_in_the_order_of_their_tokens() -> None:
    for rows in ([(1, 3, 5), (2, 0, 2)], [(1, 0, 3), (2, 2, 4)], [(1, 0, 5)]):
        with pytest.raises(AssertionError):
            Segments(rows, 4)


@needs_compiler
def test_what_is_not_finite_stays_with_its_adapter(kernel: LowRankKernel) -> None:
    for dtype, each in ((torch.float32, 3), (torch.bfloat16, 3), (torch.bfloat16, 6)):
        layer, end = _Layer(kernel, 40, 24, dtype), 3 * each
        layer.factors.put(2, torch.full((8, 40), 3e38), torch.full((24, 8), 3e38))
        x_TI, y_TO = layer.random(end, 40).abs(), layer.random(end, 24)
        rows = [(1, 0, each), (2, each, 2 * each), (3, 2 * each, end)]
        exact_TO = layer.exact(y_TO, x_TI, rows)
        layer.factors.op(Segments(rows, end))(y_TO, x_TI)
        assert not y_TO[each : 2 * each].isfinite().any()
        others = [*range(each), *range(2 * each, end)]
        room = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(y_TO[others], exact_TO[others].to(dtype), rtol=room, atol=room)


@needs_compiler
def test_a_result_too_large_for_bfloat16_and_one_that_is_no_number(kernel: LowRankKernel) -> None:
    factors = kernel.layer(2, 9, torch.bfloat16)
    factors.put(1, torch.tensor([[1.0, 0.0]]), torch.ones(9, 1))
    for value in (float("inf"), float("nan"), -float("inf"), 3.3895e38):
        y_TO, x_TI = torch.zeros(1, 9, dtype=torch.bfloat16), torch.tensor([[value, 0]], dtype=torch.bfloat16)
        factors.op(Segments([(1, 0, 1)], 1))(y_TO, x_TI)
        torch.testing.assert_close(y_TO, x_TI[:, :1].expand(1, 9), equal_nan=True, rtol=0, atol=0)


@needs_compiler
def test_a_slot_that_was_emptied_or_given_to_another_leaves_nothing(kernel: LowRankKernel) -> None:
    layer = _Layer(kernel, 20, 12, torch.float32)
    x_TI, y_TO = layer.random(4, 20), layer.random(4, 12)
    rows = [(2, 0, 4)]
    layer.factors.drop(2)
    layer.factors.drop(4)  # had nothing
    before_TO = y_TO.clone()
    layer.factors.op(Segments(rows, 4))(y_TO, x_TI)
    assert torch.equal(y_TO, before_TO)
    layer.put(2, 3)
    layer.put(200, 5)  # the table of slots grows
    exact_TO = layer.exact(y_TO, x_TI, rows)
    layer.factors.op(Segments(rows, 4))(y_TO, x_TI)
    torch.testing.assert_close(y_TO, exact_TO.float())


@needs_compiler
def test_tensors_with_gaps_and_of_another_type_are_taken_too(kernel: LowRankKernel) -> None:
    layer = _Layer(kernel, 20, 12, torch.float32)
    wide_TI, wide_TO = layer.random(6, 40), layer.random(6, 24)
    x_TI, y_TO, rows = wide_TI[:, ::2], wide_TO[:, :12], [(5, 0, 6)]
    exact_TO, beside_TO = layer.exact(y_TO, x_TI, rows), wide_TO[:, 12:].clone()
    layer.factors.op(Segments(rows, 6))(y_TO, x_TI)
    torch.testing.assert_close(y_TO, exact_TO.float())
    assert torch.equal(wide_TO[:, 12:], beside_TO)
    half_TO = torch.zeros(1, 6, 12, dtype=torch.bfloat16)
    layer.factors.op(Segments(rows, 6))(half_TO, x_TI.to(torch.bfloat16)[None])
    expected_TO = layer.exact(torch.zeros(6, 12), x_TI.to(torch.bfloat16), rows)
    torch.testing.assert_close(half_TO[0], expected_TO.to(torch.bfloat16))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_that_lie_as_they_are_read_are_not_copied(kernel: LowRankKernel, dtype: torch.dtype) -> None:
    factors = kernel.layer(20, 12, dtype)
    a_RI, b_OR = torch.ones(4, 20, dtype=dtype), torch.zeros(4, 12, dtype=dtype).t()
    factors.put(1, a_RI, b_OR)
    op, x_TI, y_TO = (
        factors.op(Segments([(1, 0, 1)], 1)),
        torch.ones(1, 20, dtype=dtype),
        torch.zeros(1, 12, dtype=dtype),
    )
    op(y_TO, x_TI)
    assert not y_TO.any()
    b_OR.fill_(1)  # the memory is the caller's own
    op(y_TO, x_TI)
    assert torch.equal(y_TO, torch.full_like(y_TO, 80))


@needs_compiler
def test_another_number_of_tokens_is_refused(kernel: LowRankKernel) -> None:
    layer = _Layer(kernel, 20, 12, torch.float32)
    add = layer.factors.op(Segments([(1, 0, 3)], 3))
    with pytest.raises(ValueError, match="factors for 3 tokens got"):
        add(torch.zeros(2, 12), torch.zeros(2, 20))


def test_without_a_compiler_there_is_no_kernel() -> None:
    with pytest.raises(NativeError, match="no C\\+\\+ compiler"):
        LowRankKernel(NativeCode(None, cache_folder(os.environ)))
