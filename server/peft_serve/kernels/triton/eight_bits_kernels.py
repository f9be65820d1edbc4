"""The program of `eight_bits`: y = step * (x V^T) + b, V the values of 8 bits, widened where they are multiplied.

Whole numbers and e4m3 floats are exact in every type that is multiplied here, so the product is that of the decoded
matrix; sums are float32, steps and bias come behind them, and y is rounded once. The order of sums depends on the
number of inputs alone.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widened(values: tl.tensor, IS_FLOAT: tl.constexpr, HAS_FLOAT: tl.constexpr, OPERAND: tl.constexpr) -> tl.tensor:
    """Values as they are multiplied. Where the GPU has no such float (`HAS_FLOAT`), its bits are put into a float16,
    whose exponent counts from 8 powers of two further down; numbers too small for an exponent come out right too."""
    if not IS_FLOAT:
        return values.to(OPERAND)
    if HAS_FLOAT:
        return values.to(tl.float8e4nv, bitcast=True).to(OPERAND)
    bits = values.to(tl.int32)
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
    return (half * 256.0).to(OPERAND)


@triton.jit(do_not_specialize=["num_tokens"])
def multiply(
    x_ptr: tl.tensor,
    values_ptr: tl.tensor,
    steps_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_in: tl.tensor,
    num_out: tl.tensor,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    HAS_FLOAT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr,
) -> None:
    """Programs are (outputs, tokens)."""
    out_O = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token_T = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    is_out_O, is_own_T = out_O < num_out, token_T < num_tokens
    x_row_ptr = x_ptr + token_T.to(tl.int64)[:, None] * num_in
    row_ptr = values_ptr + out_O.to(tl.int64)[None, :] * num_in
    sum_TO = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for at in range(0, num_in, STEP):
        in_I = at + tl.arange(0, STEP)
        is_in_I = in_I < num_in
        x_TI = tl.load(x_row_ptr + in_I[None, :], mask=is_own_T[:, None] & is_in_I[None, :], other=0.0)
        values_IO = tl.load(row_ptr + in_I[:, None], mask=is_out_O[None, :] & is_in_I[:, None], other=0)
        own_IO = widened(values_IO, IS_FLOAT, HAS_FLOAT, OPERAND)
        sum_TO = tl.dot(x_TI.to(OPERAND), own_IO, sum_TO, input_precision="ieee")
    y_TO = sum_TO * tl.load(steps_ptr + out_O, mask=is_out_O, other=0.0)[None, :]
    if HAS_BIAS:
        y_TO += tl.load(bias_ptr + out_O, mask=is_out_O, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + token_T.to(tl.int64)[:, None] * num_out + out_O[None, :],
        y_TO.to(y_ptr.dtype.element_ty),
        mask=is_own_T[:, None] & is_out_O[None, :],
    )
