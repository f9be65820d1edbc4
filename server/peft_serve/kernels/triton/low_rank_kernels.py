"""The programs of `low_rank`: u = A x for tiles of tokens (shrink; look_up where x is an id), and y = s * y + B u + c
(expand).

A program has one tile, so that it reads the factors of one adapter. It finds them in the table of entries by the
tile's slot and its layer: the addresses of A [R, I] and B [R, O], and the rank; rank 0 has nothing to do.

Sums are float32. Their order depends on the number of inputs and the adapter's rank alone: inputs are summed in parts
of a fixed size, and the parts one after the other, whether one program sums them up (`IS_WHOLE`) or as many programs
as there are parts leave that to `expand`. So what else is in the step is free to change. The height of a tile changes
no order, but on Hopper high tiles are multiplied by another instruction than low ones: the last bits of a token's term
may differ between a step with a long run in it and one without.

Operands are widened to `OPERAND`, which is their own type on a GPU; Triton's interpreter multiplies no bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(tiles_ptr: tl.tensor, tile: tl.tensor, HEIGHT: tl.constexpr) -> tl.tensor:
    """Slot, tokens, which of these are the tile's, and how many."""
    slot = tl.load(tiles_ptr + tile * 3)
    first = tl.load(tiles_ptr + tile * 3 + 1)
    count = tl.load(tiles_ptr + tile * 3 + 2)
    place_T = tl.arange(0, HEIGHT)
    return slot.to(tl.int64), (first + place_T).to(tl.int64), place_T < count, count


@triton.jit
def summed(
    x_ptr: tl.tensor,
    a_ptr: tl.tensor,
    token_T: tl.tensor,
    is_own_T: tl.tensor,
    rank_R: tl.tensor,
    is_rank_R: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    num_in: tl.tensor,
    HEIGHT: tl.constexpr,
    RANKS: tl.constexpr,
    STEP: tl.constexpr,
    OPERAND: tl.constexpr,
) -> tl.tensor:
    """[T, R] The sum over the inputs [begin, end)."""
    sum_TR = tl.zeros((HEIGHT, RANKS), dtype=tl.float32)
    for at in range(begin, end, STEP):
        in_I = at + tl.arange(0, STEP)
        is_in_I = in_I < end
        x_TI = tl.load(
            x_ptr + token_T[:, None] * num_in + in_I[None, :], mask=is_own_T[:, None] & is_in_I[None, :], other=0.0
        )
        a_IR = tl.load(
            a_ptr + rank_R[None, :] * num_in + in_I[:, None], mask=is_rank_R[None, :] & is_in_I[:, None], other=0.0
        )
        sum_TR = tl.dot(x_TI.to(OPERAND), a_IR.to(OPERAND), sum_TR, input_precision="ieee")
    return sum_TR


@triton.jit
def shrink_ranks(
    x_ptr: tl.tensor,
    low_ptr: tl.tensor,
    a_ptr: tl.tensor,
    rank: tl.tensor,
    token_T: tl.tensor,
    is_own_T: tl.tensor,
    part: tl.tensor,
    num_in: tl.tensor,
    width: tl.tensor,
    HEIGHT: tl.constexpr,
    RANKS: tl.constexpr,
    STEP: tl.constexpr,
    PART: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    OPERAND: tl.constexpr,
) -> None:
    """All ranks of an adapter, so many at a time."""
    for low in range(0, rank, RANKS):
        rank_R = low + tl.arange(0, RANKS)
        is_rank_R = rank_R < rank
        if IS_WHOLE:
            sum_TR = tl.zeros((HEIGHT, RANKS), dtype=tl.float32)
            for begin in range(0, num_in, PART):
                end = tl.minimum(begin + PART, num_in)
                sum_TR += summed(
                    x_ptr, a_ptr, token_T, is_own_T, rank_R, is_rank_R, begin, end, num_in, HEIGHT, RANKS, STEP, OPERAND
                )
        else:
            begin = part * PART
            end = tl.minimum(begin + PART, num_in)
            sum_TR = summed(
                x_ptr, a_ptr, token_T, is_own_T, rank_R, is_rank_R, begin, end, num_in, HEIGHT, RANKS, STEP, OPERAND
            )
        tl.store(
            low_ptr + token_T[:, None] * width + rank_R[None, :], sum_TR, mask=is_own_T[:, None] & is_rank_R[None, :]
        )


@triton.jit(do_not_specialize=["num_tokens"])
def shrink(
    x_ptr: tl.tensor,
    low_ptr: tl.tensor,
    entries_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    members_ptr: tl.tensor,
    num_layers: tl.tensor,
    num_in: tl.tensor,
    num_tokens: tl.tensor,
    width: tl.tensor,
    HEIGHT: tl.constexpr,
    STEP: tl.constexpr,
    PART: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    OPERAND: tl.constexpr,
) -> None:
    """low [parts, members, T, width] of x [T, I]: programs are (tile, part, member); members are layers that read x."""
    part = tl.program_id(1)
    member = tl.program_id(2)
    slot, token_T, is_own_T, count = tile_of(tiles_ptr, tl.program_id(0), HEIGHT)
    if count == 0:
        return
    entry_ptr = entries_ptr + (slot * num_layers + tl.load(members_ptr + member)) * 4
    rank = tl.load(entry_ptr + 2).to(tl.int32)
    if rank == 0:
        return
    address = tl.load(entry_ptr)
    a_ptr = tl.multiple_of(address.to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
    own_ptr = low_ptr + (part * tl.num_programs(2) + member).to(tl.int64) * num_tokens * width
    if rank <= 16:
        shrink_ranks(
            x_ptr, own_ptr, a_ptr, rank, token_T, is_own_T, part, num_in, width,
            HEIGHT, 16, STEP, PART, IS_WHOLE, OPERAND,
        )  # fmt: skip
    else:
        shrink_ranks(
            x_ptr, own_ptr, a_ptr, rank, token_T, is_own_T, part, num_in, width,
            HEIGHT, 64, STEP, PART, IS_WHOLE, OPERAND,
        )  # fmt: skip


@triton.jit(do_not_specialize=["layer", "num_ids"])
def look_up(
    ids_ptr: tl.tensor,
    low_ptr: tl.tensor,
    entries_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    layer: tl.tensor,
    num_layers: tl.tensor,
    num_ids: tl.tensor,
    width: tl.tensor,
    HEIGHT: tl.constexpr,
    RANKS: tl.constexpr,
    ELEMENT: tl.constexpr,
) -> None:
    """low [T, width] of ids [T], columns of A [R, V]: programs are (tile, so many ranks)."""
    slot, token_T, is_own_T, count = tile_of(tiles_ptr, tl.program_id(0), HEIGHT)
    if count == 0:
        return
    entry_ptr = entries_ptr + (slot * num_layers + layer) * 4
    rank = tl.load(entry_ptr + 2).to(tl.int32)
    rank_R = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    is_there_TR = is_own_T[:, None] & (rank_R < rank)[None, :]
    address = tl.load(entry_ptr)
    a_ptr = address.to(tl.pointer_type(ELEMENT))
    id_T = tl.load(ids_ptr + token_T, mask=is_own_T, other=0).to(tl.int64)
    a_TR = tl.load(a_ptr + rank_R[None, :].to(tl.int64) * num_ids + id_T[:, None], mask=is_there_TR, other=0.0)
    tl.store(low_ptr + token_T[:, None] * width + rank_R[None, :], a_TR.to(tl.float32), mask=is_there_TR)


@triton.jit
def expanded(
    low_ptr: tl.tensor,
    b_ptr: tl.tensor,
    rank: tl.tensor,
    token_T: tl.tensor,
    is_own_T: tl.tensor,
    out_O: tl.tensor,
    is_out_O: tl.tensor,
    num_out: tl.tensor,
    width: tl.tensor,
    num_parts: tl.tensor,
    part_stride: tl.tensor,
    HEIGHT: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OPERAND: tl.constexpr,
) -> tl.tensor:
    """[T, O] B u for some outputs. u is rounded to the factors' type, as A's result is in peft."""
    sum_TO = tl.zeros((HEIGHT, COLUMNS), dtype=tl.float32)
    for low in range(0, rank, RANKS):
        rank_R = low + tl.arange(0, RANKS)
        is_rank_R = rank_R < rank
        from_TR = low_ptr + token_T[:, None] * width + rank_R[None, :]
        is_there_TR = is_own_T[:, None] & is_rank_R[None, :]
        low_TR = tl.load(from_TR, mask=is_there_TR, other=0.0)
        for part in range(1, num_parts):
            low_TR += tl.load(from_TR + part * part_stride, mask=is_there_TR, other=0.0)
        b_RO = tl.load(
            b_ptr + rank_R[:, None] * num_out + out_O[None, :], mask=is_rank_R[:, None] & is_out_O[None, :], other=0.0
        )
        low_TR = low_TR.to(b_ptr.dtype.element_ty)
        sum_TO = tl.dot(low_TR.to(OPERAND), b_RO.to(OPERAND), sum_TO, input_precision="ieee")
    return sum_TO


@triton.jit(do_not_specialize=["layer", "num_parts", "part_stride"])
def expand(
    y_ptr: tl.tensor,
    low_ptr: tl.tensor,
    entries_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    shift_ptr: tl.tensor,
    layer: tl.tensor,
    num_layers: tl.tensor,
    num_out: tl.tensor,
    width: tl.tensor,
    num_parts: tl.tensor,
    part_stride: tl.tensor,
    HEIGHT: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    OPERAND: tl.constexpr,
) -> None:
    """y [T, O] in place, from the layer's part of `low`: programs are (tile, so many outputs). Vectors are [S, O]."""
    slot, token_T, is_own_T, count = tile_of(tiles_ptr, tl.program_id(0), HEIGHT)
    if count == 0:
        return
    entry_ptr = entries_ptr + (slot * num_layers + layer) * 4
    rank = tl.load(entry_ptr + 2).to(tl.int32)
    if not (HAS_SCALE or HAS_SHIFT):  # noqa: SIM102  # what is known when this is compiled, and what is not
        if rank == 0:
            return
    address = tl.load(entry_ptr + 1)
    b_ptr = tl.multiple_of(address.to(tl.pointer_type(y_ptr.dtype.element_ty)), 16)
    out_O = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_out_O = out_O < num_out
    if rank <= 16:
        sum_TO = expanded(
            low_ptr, b_ptr, rank, token_T, is_own_T, out_O, is_out_O, num_out, width, num_parts, part_stride,
            HEIGHT, 16, COLUMNS, OPERAND,
        )  # fmt: skip
    else:
        sum_TO = expanded(
            low_ptr, b_ptr, rank, token_T, is_own_T, out_O, is_out_O, num_out, width, num_parts, part_stride,
            HEIGHT, 64, COLUMNS, OPERAND,
        )  # fmt: skip
    to_TO = y_ptr + token_T[:, None] * num_out + out_O[None, :]
    is_there_TO = is_own_T[:, None] & is_out_O[None, :]
    y_TO = tl.load(to_TO, mask=is_there_TO, other=0.0).to(tl.float32)
    if HAS_SCALE:
        y_TO *= tl.load(scale_ptr + slot * num_out + out_O, mask=is_out_O, other=0.0).to(tl.float32)[None, :]
    y_TO += sum_TO
    if HAS_SHIFT:
        y_TO += tl.load(shift_ptr + slot * num_out + out_O, mask=is_out_O, other=0.0).to(tl.float32)[None, :]
    tl.store(to_TO, y_TO.to(y_ptr.dtype.element_ty), mask=is_there_TO)
