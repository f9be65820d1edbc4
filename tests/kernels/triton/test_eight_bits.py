"""Products with weights of 8 bits by the Triton kernel, in its interpreter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from peft_serve.kernels.eight_bits import Code, Coded, coded, decoded
from tests.kernels.triton.interpreter import DEVICE, IS_INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")

from peft_serve.kernels.triton.eight_bits import EightBitKernel

ON = torch.device(DEVICE)
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def there(weight: Coded) -> Coded:
    return Coded(weight.values_OI.to(ON), weight.steps_O.to(ON), weight.code)


def error(dtype: torch.dtype, code: Code, num_tokens: int, num_in: int, num_out: int, *, has_bias: bool) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = coded(torch.randn(num_out, num_in, generator=generator), code)
    x = torch.randn(num_tokens, num_in, generator=generator).to(dtype)
    bias_O = 8 * torch.randn(num_out, generator=generator).to(dtype) if has_bias else None
    exact = linear(x.double(), decoded(weight, torch.float32).double(), None if bias_O is None else bias_O.double())
    ours = EightBitKernel(ON).multiply(x.to(ON), there(weight), None if bias_O is None else bias_O.to(ON))
    assert ours.dtype is dtype
    return float((ours.cpu().double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("code", list(Code))
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_products_are_those_of_the_decoded_matrix(dtype: torch.dtype, code: Code) -> None:
    """Odd sizes: parts of tiles of tokens, of outputs and of steps."""
    assert error(dtype, code, 3, 130, 21, has_bias=True) < BOUNDS[dtype]
    assert error(dtype, code, 35, 66, 17, has_bias=False) < BOUNDS[dtype]


def test_every_float_of_8_bits_is_widened_to_itself() -> None:
    """Each bit pattern but the two that are no numbers, the ones too small for an exponent among them."""
    patterns = torch.tensor([i for i in range(-128, 128) if i & 0x7F != 0x7F], dtype=torch.int8)
    weight = Coded(patterns[:, None].repeat(1, 16), torch.ones(len(patterns)), Code.FP8)
    x = torch.zeros(1, 16)
    x[0, 3] = 1
    ours = EightBitKernel(ON).multiply(x.to(ON), there(weight), None).cpu()
    assert torch.equal(ours[0], patterns.view(torch.float8_e4m3fn).float())


def test_many_tokens_and_none() -> None:
    kernel = EightBitKernel(ON, most_tokens=4)
    weight = coded(torch.randn(16, 32, generator=torch.Generator().manual_seed(1)), Code.INT8)
    x = torch.randn(2, 5, 32).to(ON)
    assert torch.allclose(
        kernel.multiply(x, there(weight), None).cpu(), x.cpu() @ decoded(weight, x.dtype).t(), atol=1e-5
    )
    assert kernel.multiply(x[:, :0], there(weight), None).shape == (2, 0, 16)


@pytest.mark.skipif(IS_INTERPRETED, reason="numpy rounds by where a row stands")
def test_a_token_has_the_same_bits_in_any_batch() -> None:
    weight = there(coded(torch.randn(96, 512), Code.FP8))
    x = torch.randn(40, 512, dtype=torch.bfloat16, device=ON)
    together = EightBitKernel(ON).multiply(x, weight, None)
    for first, last in ((0, 1), (30, 33), (8, 24)):
        assert torch.equal(EightBitKernel(ON).multiply(x[first:last], weight, None), together[first:last])
