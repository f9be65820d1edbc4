"""Weights in 8 bits: what they stand for, and that products with them are products with that."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from peft_serve.kernels.eight_bits import Code, coded, decoded, is_torchs_own, multiplied

CODES = list(Code)


@pytest.fixture(params=CODES)
def code(request: pytest.FixtureRequest) -> Code:
    given: Code = request.param
    return given


def test_a_weight_comes_back_within_half_a_step(code: Code) -> None:
    weight_OI = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 24)[:, None]
    before = weight_OI.clone()
    stored = coded(weight_OI, code)
    assert torch.equal(weight_OI, before)
    assert stored.values_OI.dtype is torch.int8
    assert (stored.num_out, stored.num_in) == (24, 40)
    largest_O1 = weight_OI.abs().amax(1, keepdim=True)
    error_OI = (decoded(stored, torch.float32) - weight_OI).abs()
    # Steps are rounded by one part in 512, and with them what the largest value may stand for.
    if code is Code.INT8:
        assert bool((error_OI <= largest_O1 * (0.5 / 127 + 1 / 256)).all())
        assert float((error_OI / largest_O1).median()) < 0.4 / 127
    else:
        assert bool((error_OI <= weight_OI.abs() / 16 + largest_O1 * (2.0**-10 / 448 + 1 / 256)).all())
    assert bool((stored.values_OI != 0).any(1).all())


def test_steps_and_values_are_exact_in_both_types(code: Code) -> None:
    stored = coded(torch.randn(16, 48, generator=torch.Generator().manual_seed(1)), code)
    exact = decoded(stored, torch.float32)
    assert torch.equal(stored.steps_O.bfloat16().float(), stored.steps_O)
    values = stored.values_OI.float() if code is Code.INT8 else stored.values_OI.view(torch.float8_e4m3fn).float()
    assert torch.equal(exact.double(), values.double() * stored.steps_O.double()[:, None])
    assert torch.equal(decoded(stored, torch.bfloat16), exact.bfloat16())
    assert torch.equal(decoded(stored, torch.float16), exact.half())


def test_an_output_of_zeros_stays_one(code: Code) -> None:
    weight_OI = torch.randn(3, 16)
    weight_OI[1] = 0
    assert not decoded(coded(weight_OI, code), torch.float32)[1].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(code: Code, bad: float) -> None:
    weight_OI = torch.ones(3, 16)
    weight_OI[2, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        coded(weight_OI, code)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_in", [75, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_that_of_the_decoded_matrix(code: Code, dtype: torch.dtype, num_in: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    stored = coded(torch.randn(70, num_in, generator=generator), code)
    assert is_torchs_own(stored, torch.device("cpu"), dtype) == (
        num_in == 128 and code is Code.INT8 and dtype is torch.bfloat16
    )
    x = torch.randn(2, 5, num_in, generator=generator).to(dtype)
    bias_O = torch.randn(70, generator=generator).to(dtype) if has_bias else None
    exact = linear(x.double(), decoded(stored, torch.float32).double(), None if bias_O is None else bias_O.double())
    ours = multiplied(x, stored, bias_O)
    assert ours.dtype is dtype
    assert ours.shape == (2, 5, 70)
    bound = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert float((ours.double() - exact).abs().max() / exact.abs().max()) < bound


def test_whole_numbers_give_a_token_the_same_bits_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    stored = coded(torch.randn(96, 192, generator=generator), Code.INT8)
    x = torch.randn(33, 192, generator=generator).bfloat16()
    together = multiplied(x, stored, None)
    for first, last in ((0, 1), (7, 8), (5, 9), (0, 32), (32, 33)):
        assert torch.equal(multiplied(x[first:last], stored, None), together[first:last]), (first, last)
