"""The program of `bottleneck`: y = scale * (U act(u + b) + c) from u = D x, for a tile of tokens of one adapter.

u comes from `low_rank_kernels.shrink`, in parts that are added up here. The adapter's numbers are found in the table of
entries by slot and layer: the addresses of D [B, I] and of U turned, [B, O], B, and the address of the vectors c [O],
scale [O] and b [B], one behind the other; B = 0 has nothing to do. Sums are float32; u is rounded once, behind act.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_serve.kernels.triton.low_rank_kernels import tile_of


@triton.jit
def activated(x: tl.tensor, NAME: tl.constexpr) -> tl.tensor:
    """As transformers' `ACT2FN`; a number that is none stays one."""
    y = x
    if NAME == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif NAME == "relu6":
        y = tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif NAME == "leakyrelu":
        y = tl.where(x < 0, 0.01 * x, x)
    elif NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_new" or NAME == "gelu_fast":  # Triton knows no `in`
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    elif NAME == "swish" or NAME == "silu":
        y = x * tl.sigmoid(x)
    elif NAME == "tanh":
        y = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    elif NAME == "sigmoid":
        y = tl.sigmoid(x)
    elif NAME == "mish":
        grown = tl.exp(tl.where(x > 20, 20.0, x))
        square = grown * (grown + 2.0)
        y = tl.where(x > 20, x, x * square / (square + 2.0))
    return y


@triton.jit(do_not_specialize=["layer", "num_parts", "part_stride"])
def lift(
    y_ptr: tl.tensor,
    low_ptr: tl.tensor,
    entries_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    layer: tl.tensor,
    num_layers: tl.tensor,
    num_out: tl.tensor,
    width: tl.tensor,
    num_parts: tl.tensor,
    part_stride: tl.tensor,
    HEIGHT: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OPERAND: tl.constexpr,
) -> None:
    """y [T, O], overwritten for tokens that have a bottleneck: programs are (tile, so many outputs)."""
    slot, token_T, is_own_T, count = tile_of(tiles_ptr, tl.program_id(0), HEIGHT)
    if count == 0:
        return
    entry_ptr = entries_ptr + (slot * num_layers + layer) * 4
    size = tl.load(entry_ptr + 2).to(tl.int32)
    if size == 0:
        return
    kind = tl.pointer_type(y_ptr.dtype.element_ty)
    up_address = tl.load(entry_ptr + 1)
    up_ptr = tl.multiple_of(up_address.to(kind), 16)
    vectors_address = tl.load(entry_ptr + 3)
    vectors_ptr = tl.multiple_of(vectors_address.to(kind), 16)
    out_O = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_out_O = out_O < num_out
    sum_TO = tl.zeros((HEIGHT, COLUMNS), dtype=tl.float32)
    for at in range(0, size, RANKS):
        low_B = at + tl.arange(0, RANKS)
        is_low_B = low_B < size
        from_TB = low_ptr + token_T[:, None] * width + low_B[None, :]
        is_there_TB = is_own_T[:, None] & is_low_B[None, :]
        low_TB = tl.load(from_TB, mask=is_there_TB, other=0.0)
        for part in range(1, num_parts):
            low_TB += tl.load(from_TB + part * part_stride, mask=is_there_TB, other=0.0)
        bias_B = tl.load(vectors_ptr + 2 * num_out + low_B, mask=is_low_B, other=0.0).to(tl.float32)
        low_TB = activated(low_TB + bias_B[None, :], ACTIVATION).to(y_ptr.dtype.element_ty)
        up_BO = tl.load(
            up_ptr + low_B[:, None] * num_out + out_O[None, :], mask=is_low_B[:, None] & is_out_O[None, :], other=0.0
        )
        sum_TO = tl.dot(low_TB.to(OPERAND), up_BO.to(OPERAND), sum_TO, input_precision="ieee")
    bias_O = tl.load(vectors_ptr + out_O, mask=is_out_O, other=0.0).to(tl.float32)
    scale_O = tl.load(vectors_ptr + num_out + out_O, mask=is_out_O, other=0.0).to(tl.float32)
    y_TO = (sum_TO + bias_O[None, :]) * scale_O[None, :]
    tl.store(
        y_ptr + token_T[:, None] * num_out + out_O[None, :],
        y_TO.to(y_ptr.dtype.element_ty),
        mask=is_own_T[:, None] & is_out_O[None, :],
    )
