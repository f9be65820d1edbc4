"""The program of `gated`: o += gate * softmax(q K^T / sqrt(D)) V, for a tile of tokens of one adapter and a head.

The adapter's numbers are found in the table of entries by slot and layer: the addresses of K and of V, both [H, M, D],
M in the lower half of a number and H in the upper, and the address of the gate; 0 has nothing to do. Learned tokens are
read so many at a time, in order, so that a token's result depends on its adapter alone. Sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_serve.kernels.triton.low_rank_kernels import tile_of


@triton.jit
def attended(
    q_TD: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    before: tl.tensor,
    num_keys: tl.tensor,
    head_dim: tl.tensor,
    scale: tl.tensor,
    HEIGHT: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
    OPERAND: tl.constexpr,
) -> tl.tensor:
    """[T, D] softmax(q K^T) V over the keys behind the first `before`."""
    in_D = tl.arange(0, SIZE)
    is_in_D = in_D < head_dim
    largest_T = tl.full((HEIGHT,), float("-inf"), dtype=tl.float32)
    total_T = tl.zeros((HEIGHT,), dtype=tl.float32)
    sum_TD = tl.zeros((HEIGHT, SIZE), dtype=tl.float32)
    for first in range(0, num_keys, KEYS):
        key_M = first + tl.arange(0, KEYS)
        is_key_M = key_M < num_keys
        row_M = (before + key_M) * head_dim
        k_DM = tl.load(keys_ptr + row_M[None, :] + in_D[:, None], mask=is_key_M[None, :] & is_in_D[:, None], other=0.0)
        score_TM = tl.dot(q_TD, k_DM.to(OPERAND), input_precision="ieee") * scale
        score_TM = tl.where(is_key_M[None, :], score_TM, float("-inf"))
        larger_T = tl.maximum(largest_T, tl.max(score_TM, 1))
        weight_TM = tl.exp(score_TM - larger_T[:, None])
        before_T = tl.exp(largest_T - larger_T)
        v_MD = tl.load(
            values_ptr + row_M[:, None] + in_D[None, :], mask=is_key_M[:, None] & is_in_D[None, :], other=0.0
        )
        sum_TD = tl.dot(
            weight_TM.to(keys_ptr.dtype.element_ty).to(OPERAND),
            v_MD.to(OPERAND),
            sum_TD * before_T[:, None],
            input_precision="ieee",
        )
        total_T = total_T * before_T + tl.sum(weight_TM, 1)
        largest_T = larger_T
    return sum_TD / total_T[:, None]


@triton.jit(do_not_specialize=["layer"])
def add_gated(
    to_ptr: tl.tensor,
    q_ptr: tl.tensor,
    entries_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    layer: tl.tensor,
    num_layers: tl.tensor,
    num_heads: tl.tensor,
    head_dim: tl.tensor,
    scale: tl.tensor,
    HEIGHT: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
    OPERAND: tl.constexpr,
) -> None:
    """[T, Q, D] in place, from q [T, Q, D]: programs are (tile, query head); `SIZE` is D, up to a power of two."""
    slot, token_T, is_own_T, count = tile_of(tiles_ptr, tl.program_id(0), HEIGHT)
    if count == 0:
        return
    entry_ptr = entries_ptr + (slot * num_layers + layer) * 4
    sizes = tl.load(entry_ptr + 2)
    if sizes == 0:
        return
    num_keys = sizes.to(tl.int32)
    num_own = (sizes >> 32).to(tl.int32)
    kind = tl.pointer_type(q_ptr.dtype.element_ty)
    keys_address = tl.load(entry_ptr)
    keys_ptr = tl.multiple_of(keys_address.to(kind), 16)
    values_address = tl.load(entry_ptr + 1)
    values_ptr = tl.multiple_of(values_address.to(kind), 16)
    gate_address = tl.load(entry_ptr + 3)
    gate_ptr = gate_address.to(kind)
    head = tl.program_id(1)
    own_head = head // (num_heads // num_own)
    in_D = tl.arange(0, SIZE)
    is_in_D = in_D < head_dim
    at_TD = (token_T[:, None] * num_heads + head) * head_dim + in_D[None, :]
    is_there_TD = is_own_T[:, None] & is_in_D[None, :]
    q_TD = tl.load(q_ptr + at_TD, mask=is_there_TD, other=0.0).to(OPERAND)
    attended_TD = attended(
        q_TD, keys_ptr, values_ptr, own_head * num_keys, num_keys, head_dim, scale, HEIGHT, KEYS, SIZE, OPERAND
    )
    added_TD = tl.load(gate_ptr).to(tl.float32) * attended_TD
    to_TD = tl.load(to_ptr + at_TD, mask=is_there_TD, other=0.0).to(tl.float32)
    added_TD = added_TD.to(to_ptr.dtype.element_ty).to(tl.float32)  # rounded by itself, as peft adds it
    tl.store(to_ptr + at_TD, (to_TD + added_TD).to(to_ptr.dtype.element_ty), mask=is_there_TD)
