"""The program of `mixing`: x -> concat_j(x_j R_j) for a tile of tokens of one adapter, at some outputs of one block.

It finds the adapter's blocks [n, k, k] in the table of entries by slot and layer: their address, k and n; n = 0 has
nothing to do. Sums are float32, over the k inputs of a block in order, and are rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_serve.kernels.triton.low_rank_kernels import tile_of


@triton.jit
def mix_block(
    to_ptr: tl.tensor,
    from_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    token_T: tl.tensor,
    is_own_T: tl.tensor,
    place: tl.tensor,
    size: tl.tensor,
    num_blocks: tl.tensor,
    num_features: tl.tensor,
    HEIGHT: tl.constexpr,
    SIDE: tl.constexpr,
    OPERAND: tl.constexpr,
) -> None:
    """Places count the outputs of all blocks, `SIDE` at a time and none of two blocks."""
    places_each = tl.cdiv(size, SIDE)
    block = place // places_each
    if block < num_blocks:
        out_K = (place % places_each) * SIDE + tl.arange(0, SIDE)
        is_out_K = out_K < size
        sum_TK = tl.zeros((HEIGHT, SIDE), dtype=tl.float32)
        for at in range(0, size, SIDE):
            in_K = at + tl.arange(0, SIDE)
            is_in_K = in_K < size
            x_TK = tl.load(
                from_ptr + token_T[:, None] * num_features + (block * size + in_K)[None, :],
                mask=is_own_T[:, None] & is_in_K[None, :],
                other=0.0,
            )
            r_KK = tl.load(
                blocks_ptr + (block * size + in_K)[:, None] * size + out_K[None, :],
                mask=is_in_K[:, None] & is_out_K[None, :],
                other=0.0,
            )
            sum_TK = tl.dot(x_TK.to(OPERAND), r_KK.to(OPERAND), sum_TK, input_precision="ieee")
        tl.store(
            to_ptr + token_T[:, None] * num_features + (block * size + out_K)[None, :],
            sum_TK.to(to_ptr.dtype.element_ty),
            mask=is_own_T[:, None] & is_out_K[None, :],
        )


@triton.jit(do_not_specialize=["layer"])
def mix(
    to_ptr: tl.tensor,
    from_ptr: tl.tensor,
    entries_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    layer: tl.tensor,
    num_layers: tl.tensor,
    num_features: tl.tensor,
    HEIGHT: tl.constexpr,
    OPERAND: tl.constexpr,
) -> None:
    """[T, D] from other memory, [T, D]: programs are (tile, place)."""
    slot, token_T, is_own_T, count = tile_of(tiles_ptr, tl.program_id(0), HEIGHT)
    if count == 0:
        return
    entry_ptr = entries_ptr + (slot * num_layers + layer) * 4
    num_blocks = tl.load(entry_ptr + 2).to(tl.int32)
    if num_blocks == 0:
        return
    size = tl.load(entry_ptr + 1).to(tl.int32)
    address = tl.load(entry_ptr)
    blocks_ptr = tl.multiple_of(address.to(tl.pointer_type(to_ptr.dtype.element_ty)), 16)
    place = tl.program_id(1)
    if size <= 16:
        mix_block(
            to_ptr, from_ptr, blocks_ptr, token_T, is_own_T, place, size, num_blocks, num_features,
            HEIGHT, 16, OPERAND,
        )  # fmt: skip
    elif size % 16 == 0:  # a number that the compiler knows to be a multiple of 16 makes reads wide
        mix_block(
            to_ptr, from_ptr, blocks_ptr, token_T, is_own_T, place, size // 16 * 16, num_blocks, num_features,
            HEIGHT, 32, OPERAND,
        )  # fmt: skip
    else:
        mix_block(
            to_ptr, from_ptr, blocks_ptr, token_T, is_own_T, place, size, num_blocks, num_features,
            HEIGHT, 32, OPERAND,
        )  # fmt: skip
