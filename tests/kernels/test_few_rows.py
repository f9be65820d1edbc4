"""The product of few rows: right, and the same bits for a row wherever it stands."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from peft_serve.kernels.few_rows import FewRows
from peft_serve.kernels.native import NativeCode, cache_folder, find_compiler

pytestmark = pytest.mark.skipif(find_compiler(os.environ) is None, reason="this machine has no C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=[False, True], ids=["vectors", "tiles"])
def few_rows(request: pytest.FixtureRequest) -> FewRows:
    made = FewRows(NativeCode(find_compiler(os.environ), cache_folder(os.environ)), tiles=request.param)
    if made.has_tiles != request.param:
        pytest.skip("this CPU has no matrix unit")
    return made


def _random(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_out", "num_in"), [(1, 1), (5, 7), (16, 256), (33, 257), (200, 300), (127, 640)])
def test_a_product_is_the_product(few_rows: FewRows, num_out: int, num_in: int, dtype: torch.dtype) -> None:
    weight, bias = _random(num_out, num_in, dtype=dtype), _random(num_out, dtype=dtype)
    plain, biased = few_rows.linear(weight, None), few_rows.linear(weight, bias)
    for num_rows in (1, 2, 3, 5, 6, 7, 16, 97, 200):
        x = _random(1, num_rows, num_in, dtype=dtype)
        exact = x.double() @ weight.double().t()
        for y, expected in ((plain(x), exact), (biased(x), exact + bias.double())):
            assert y.shape == (1, num_rows, num_out)
            assert y.dtype == dtype
            # one rounding of the exact result, beside that of the sums
            room = (2.0**-8 if dtype == torch.bfloat16 else 0) * expected.abs() + 3e-6 * num_in**0.5
            assert ((y - expected).abs() <= room).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("num_out", "num_in"), [(33, 257), (250, 600), (640, 1030)])
def test_a_row_has_the_same_bits_in_any_batch(
    few_rows: FewRows, num_out: int, num_in: int, num_threads: int, dtype: torch.dtype
) -> None:
    product = few_rows.linear(_random(num_out, num_in, dtype=dtype), _random(num_out, dtype=dtype))
    x_MI = _random(130, num_in, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone_MO = torch.cat([product(row_I[None]) for row_I in x_MI])
        torch.set_num_threads(num_threads)
        for num_rows in (*range(1, 65), 97, 130):
            assert torch.equal(product(x_MI[:num_rows]), alone_MO[:num_rows])
        assert torch.equal(product(x_MI.flip(0)), alone_MO.flip(0))
    finally:
        torch.set_num_threads(before)


def test_a_vocabulary_of_any_size_is_shared_out_whole(few_rows: FewRows) -> None:
    """More panels than a call has parts of the usual size for."""
    weight, x = _random(600_000, 2, dtype=torch.float32), _random(3, 2, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        y = few_rows.linear(weight, None)(x)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(y, linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_longer_than_the_caches_hold_is_multiplied_whole(few_rows: FewRows, dtype: torch.dtype) -> None:
    weight, x = _random(70, 9000, dtype=dtype), _random(150, 9000, dtype=dtype)
    y = few_rows.linear(weight, None)(x)
    exact = x.double() @ weight.double().t()
    assert ((y - exact).abs() <= (2.0**-8 if dtype == torch.bfloat16 else 0) * exact.abs() + 3e-4).all()
    assert torch.equal(few_rows.linear(weight, None)(x[131:132])[0], y[131])


@pytest.mark.parametrize("num_rows", [1, 16, 17, 33])
def test_what_is_no_number_stays_none_and_where_it_was(few_rows: FewRows, num_rows: int) -> None:
    weight, x = _random(70, 40, dtype=torch.bfloat16), _random(num_rows, 40, dtype=torch.bfloat16)
    whole = few_rows.linear(weight, None)(x)
    x[-1, 39] = float("nan")
    y = few_rows.linear(weight, None)(x)
    assert y[-1].isnan().all()
    assert torch.equal(y[:-1], whole[:-1])
    large = torch.full_like(weight, 3e38)
    assert few_rows.linear(large, None)(x.abs() + 2)[0].isinf().all() or num_rows == 1


def test_any_strides_are_read(few_rows: FewRows) -> None:
    weight, x = _random(40, 30, dtype=torch.float32), _random(6, 60, dtype=torch.float32)[:, ::2]
    by_column = few_rows.linear(weight.t().contiguous().t(), None)
    assert torch.equal(by_column(x), few_rows.linear(weight, None)(x.contiguous()))
    torch.testing.assert_close(by_column(x), linear(x, weight))


def test_an_overflow_and_a_nan_stay_in_their_row(few_rows: FewRows) -> None:
    weight, x = _random(20, 64, dtype=torch.float32), _random(8, 64, dtype=torch.float32)
    product = few_rows.linear(weight, None)
    before = product(x)
    x[3, 5], x[4, 6] = float("nan"), float("inf")
    after = product(x)
    assert after[3].isnan().all()
    assert not after[4].isfinite().any()
    others = [0, 1, 2, 5, 6, 7]
    assert torch.equal(after[others], before[others])


def test_no_rows_give_no_rows(few_rows: FewRows) -> None:
    assert few_rows.linear(_random(5, 7, dtype=torch.float32), None)(torch.empty(0, 7)).shape == (0, 5)


def test_the_weight_is_copied(few_rows: FewRows) -> None:
    weight, x = _random(5, 7, dtype=torch.float32), _random(2, 7, dtype=torch.float32)
    product, before = few_rows.linear(weight, None), linear(x, weight)
    weight.zero_()
    torch.testing.assert_close(product(x), before)


def test_a_row_of_another_width_or_dtype_is_a_mistake_of_ours(few_rows: FewRows) -> None:
    product = few_rows.linear(_random(5, 7, dtype=torch.float32), None)
    for x in (torch.zeros(2, 8), torch.zeros(2, 7, dtype=torch.bfloat16)):
        with pytest.raises(AssertionError, match="a product of"):
            product(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_out", "num_in"), [(1, 1), (5, 7), (32, 64), (33, 257), (200, 300)])
def test_rows_are_given_back_bit_by_bit(few_rows: FewRows, num_out: int, num_in: int, dtype: torch.dtype) -> None:
    words = torch.int32 if dtype == torch.float32 else torch.int16
    weight = _random(num_out, num_in, dtype=dtype)
    weight[0, 0], weight[-1, -1] = -0.0, 1e-41  # bits that arithmetic would lose
    for given in (weight, weight.t().contiguous().t()):
        product = few_rows.linear(given, None)
        assert torch.equal(product.take(torch.arange(num_out)).view(words), weight.view(words))
        numbers = torch.tensor([num_out - 1, 0, num_out // 2, 0])
        assert torch.equal(product.take(numbers).view(words), weight[numbers].view(words))
        assert product.take(numbers[:0]).shape == (0, num_in)


@pytest.mark.parametrize("number", [-1, 5])
def test_a_row_that_is_not_there_is_not_given(few_rows: FewRows, number: int) -> None:
    product = few_rows.linear(_random(5, 7, dtype=torch.float32), None)
    with pytest.raises(IndexError, match="rows 0 to 4"):
        product.take(torch.tensor([0, number]))
