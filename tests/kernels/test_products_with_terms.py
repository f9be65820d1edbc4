"""Products and low-rank terms in one call of the matrix unit: the bits of one behind the other."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from peft_serve.kernels.few_rows import FewRows, Product
from peft_serve.kernels.low_rank import LayerFactors, LowRankKernel, Segments
from peft_serve.kernels.native import NativeCode, cache_folder, find_compiler

pytestmark = pytest.mark.skipif(find_compiler(os.environ) is None, reason="this machine has no C++ compiler")
RANKS = {1: 8, 2: 16, 3: 5, 4: 40, 5: 1}
Row = tuple[int, int, int]


@pytest.fixture(scope="module")
def code() -> NativeCode:
    return NativeCode(find_compiler(os.environ), cache_folder(os.environ))


@pytest.fixture(scope="module")
def kernels(code: NativeCode) -> tuple[FewRows, LowRankKernel]:
    made = FewRows(code), LowRankKernel(code)
    if made[0].each_with(torch.bfloat16) is None:
        pytest.skip("this CPU has no matrix unit")
    return made


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class _Layers:
    """Layers of one input side by side; the one in the middle has a bias and no adapters."""

    def __init__(self, kernels: tuple[FewRows, LowRankKernel], num_in: int, nums_out: tuple[int, ...]) -> None:
        self._rng = torch.Generator().manual_seed(num_in)
        self._few_rows, low_rank = kernels
        self._num_in = num_in
        self.products: list[Product] = []
        self.factors: list[LayerFactors | None] = []
        for i, num_out in enumerate(nums_out):
            bias = None if i == 2 else self.random(num_out)
            self.products.append(self._few_rows.linear(self.random(num_out, num_in), bias))
            factors = low_rank.layer(num_in, num_out, torch.bfloat16) if i != 1 else None
            self.factors.append(factors)
            for slot, rank in RANKS.items():
                if factors is not None and (slot, i) != (3, 2):
                    factors.put(slot, self.random(rank, num_in), self.random(num_out, rank))

    def random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._rng).to(torch.bfloat16)

    def apart(self, x_TI: Tensor, segments: Segments) -> list[Tensor]:
        ys = [product(x_TI) for product in self.products]
        for y, factors in zip(ys, self.factors, strict=True):
            if factors is not None:
                factors.op(segments)(y, x_TI)
        return ys

    def together(self, x_TI: Tensor, segments: Segments) -> list[Tensor]:
        ys = [torch.full((len(x_TI), each.num_out), torch.nan, dtype=torch.bfloat16) for each in self.products]
        tables = [None if each is None else each.by_slot(segments) for each in self.factors]
        pointers = ctypes.c_void_p * len(ys)
        self._few_rows.each_with(torch.bfloat16)(
            pointers(*(product.address for product in self.products)),
            ctypes.c_long(len(ys)),
            ctypes.c_void_p(x_TI.data_ptr()),
            pointers(*(y.data_ptr() for y in ys)),
            ctypes.c_long(len(x_TI)),
            pointers(*(None if table is None else table.address for table in tables)),
            ctypes.c_void_p(segments.address),
        )
        return ys


def _steps() -> Iterator[tuple[list[Row], int]]:
    """The base alone, one adapter, one for each token, runs of all lengths, a prompt."""
    yield [], 5
    yield [(1, 0, 1)], 1
    yield [(4, 0, 2)], 2
    for num_tokens in (3, 16, 17, 32, 33, 100):
        yield [(2, 0, num_tokens)], num_tokens
        yield [(1 + t % 5, t, t + 1) for t in range(num_tokens)], num_tokens
    rng = random.Random(3)
    for _ in range(12):
        num_tokens = rng.randrange(5, 80)
        cuts = sorted({0, num_tokens, *(rng.randrange(num_tokens) for _ in range(rng.randrange(2, 9)))})
        yield [(slot, *ends) for ends in pairwise(cuts) if (slot := rng.randrange(6))], num_tokens


@pytest.mark.parametrize(
    ("num_in", "nums_out"), [(96, (64, 32, 160)), (75, (70, 33, 31)), (1100, (96,)), (2090, (40, 1100, 20))]
)
def test_bits_are_those_of_one_behind_the_other(
    kernels: tuple[FewRows, LowRankKernel], num_in: int, nums_out: tuple[int, ...], num_threads: int
) -> None:
    layers = _Layers(kernels, num_in, nums_out)
    for rows, num_tokens in _steps():
        segments, x_TI = Segments(rows, num_tokens, num_slots=6), layers.random(num_tokens, num_in)
        for own, expected in zip(layers.together(x_TI, segments), layers.apart(x_TI, segments), strict=True):
            assert torch.equal(own, expected), rows


def test_only_bfloat16_is_multiplied_with_its_terms(kernels: tuple[FewRows, LowRankKernel], code: NativeCode) -> None:
    assert kernels[0].each_with(torch.float32) is None
    assert FewRows(code, tiles=False).each_with(torch.bfloat16) is None
