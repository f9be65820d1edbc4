"""What a program of the attention does, in Triton: a tile of queries over a stretch of context, or a merge of parts.

A softmax that is never whole in memory (arXiv:2112.05682, arXiv:2205.14135), over blocks (arXiv:2309.06180), with the
context of few queries split over programs (flash-decoding). Sums are float32. What the numbers of a tile and of a merge
mean is for `attention_numbers`, who launches them for `attention`.

Shapes: `M` queries of a tile (token after token, in each its heads), `N` keys read at once, `D` head size (a power of
two, padded), `S` parts of a token's context.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_serve.kernels.triton.attention_numbers import MERGE_SIZE, PART_TAIL, TILE_SIZE

_TILE_SIZE = tl.constexpr(TILE_SIZE)
_MERGE_SIZE = tl.constexpr(MERGE_SIZE)
_PART_TAIL = tl.constexpr(PART_TAIL)


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """By its series where 1 - exp would lose digits."""
    square = x * x
    series = -0.333333333 + square * (0.133333333 + square * (-0.0539682540 + square * 0.0218694885))
    rest = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - rest) / (1.0 + rest)
    return tl.where(tl.abs(x) < 0.25, x * (1.0 + square * series), tl.where(x < 0, -far, far))


@triton.jit
def _readable(
    at_N: tl.tensor,
    stop: tl.tensor,
    gap: tl.tensor,
    unplaced: tl.tensor,
    is_here: tl.tensor,
    place: tl.tensor,
    WINDOW: tl.constexpr,
) -> tl.tensor:
    """Context positions, whether any token of the tile reads them, and which carry no position."""
    is_lead_N = at_N < unplaced
    context_N = tl.where(is_lead_N, at_N, at_N + gap)
    is_near_N = is_lead_N | (context_N > place - WINDOW) if WINDOW > 0 else at_N >= 0
    return context_N, (at_N < stop) & is_near_N & (is_here | (at_N >= unplaced)), is_lead_N


@triton.jit
def _masked(
    scores_MN: tl.tensor,
    place_M: tl.tensor,
    context_N: tl.tensor,
    is_read_N: tl.tensor,
    is_lead_N: tl.tensor,
    WINDOW: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
) -> tl.tensor:
    """Scores, and -inf where a token does not read."""
    may_MN = is_read_N[None, :] & (place_M[:, None] >= 0)
    if IS_CAUSAL:
        is_past_MN = context_N[None, :] <= place_M[:, None]
        if WINDOW > 0:
            is_past_MN = is_past_MN & (context_N[None, :] > place_M[:, None] - WINDOW)
        may_MN = may_MN & (is_past_MN | is_lead_N[None, :])
    return tl.where(may_MN, scores_MN, float("-inf"))


@triton.jit
def _biased(
    scores_MN: tl.tensor,
    bias_ptr: tl.tensor,
    head_M: tl.tensor,
    place_M: tl.tensor,
    context_N: tl.tensor,
    unplaced: tl.tensor,
    FAR: tl.constexpr,
    DIVISOR: tl.constexpr,
) -> tl.tensor:
    """Scores with T5's bias by distance, or with ALiBi's by position, rounded as the model rounds it."""
    if FAR > 0:
        distance_MN = context_N[None, :] - place_M[:, None] + unplaced
        near_MN = tl.minimum(tl.maximum(distance_MN, -FAR), FAR) + FAR
        return scores_MN + tl.load(bias_ptr + head_M[:, None] * (2 * FAR + 1) + near_MN).to(tl.float32)
    else:  # noqa: RET505 - both ways end in the same block only so
        slope_M = tl.load(bias_ptr + head_M)
        number_N = context_N.to(tl.float32).to(slope_M.dtype).to(tl.float32)
        product_MN = slope_M.to(tl.float32)[:, None] * number_N[None, :]
        return scores_MN + product_MN.to(slope_M.dtype).to(tl.float32) / DIVISOR


@triton.jit
def _products(
    q_MD: tl.tensor, k_ND: tl.tensor, SCALING: tl.constexpr, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr
) -> tl.tensor:
    """Scores before bias and mask."""
    if WIDEN:
        q_MD, k_ND = q_MD.to(tl.float32), k_ND.to(tl.float32)
    scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * SCALING
    if SOFTCAP > 0:
        scores_MN = SOFTCAP * _tanh(scores_MN / SOFTCAP)
    return scores_MN


@triton.jit
def _folded(
    scores_MN: tl.tensor, v_ND: tl.tensor, peak_M: tl.tensor, total_M: tl.tensor, sum_MD: tl.tensor, WIDEN: tl.constexpr
) -> tl.tensor:
    """The softmax so far, with these keys too."""
    new_M = tl.maximum(peak_M, tl.max(scores_MN, 1))
    shift_M = tl.where(new_M == float("-inf"), 0.0, new_M)  # nothing is read yet
    kept_M = tl.exp(peak_M - shift_M)
    share_MN = tl.exp(scores_MN - shift_M[:, None])
    total_M = total_M * kept_M + tl.sum(share_MN, 1)
    sum_MD = sum_MD * kept_M[:, None]
    if WIDEN:
        v_ND = v_ND.to(tl.float32)
    return new_M, total_M, sum_MD + tl.dot(share_MN.to(v_ND.dtype), v_ND, input_precision="ieee")


@triton.jit
def _tile(tile_ptr: tl.tensor) -> tl.tensor:
    """Its first token, context position, stretch of the context, gap, positions in front, blocks, part and row."""
    token, place = tl.load(tile_ptr), tl.load(tile_ptr + 2)
    start, stop, gap = tl.load(tile_ptr + 3), tl.load(tile_ptr + 4), tl.load(tile_ptr + 5)
    unplaced, table = tl.load(tile_ptr + 6), tl.load(tile_ptr + 7)
    return token, place, start, stop, gap, unplaced, table, tl.load(tile_ptr + 8), tl.load(tile_ptr + 9)


@triton.jit
def _store(
    out_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    place: tl.tensor,
    token: tl.tensor,
    part: tl.tensor,
    place_M: tl.tensor,
    head_M: tl.tensor,
    peak_M: tl.tensor,
    total_M: tl.tensor,
    sum_MD: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
) -> None:
    """The result of a whole context, or what is known of it after a part."""
    d_D = tl.arange(0, D_PAD)
    is_own_M = place_M >= 0
    is_own_MD = is_own_M[:, None] & (d_D < D)[None, :]
    if part < 0:
        if sinks_ptr is not None:
            sink_M = tl.load(sinks_ptr + head_M).to(tl.float32)
            top_M = tl.maximum(peak_M, sink_M)
            kept_M = tl.exp(peak_M - top_M)
            total_M = total_M * kept_M + tl.exp(sink_M - top_M)
            sum_MD = sum_MD * kept_M[:, None]
        out_M = (token + place_M - place).to(tl.int64) * (H * D) + head_M * D
        share_MD = sum_MD / tl.where(is_own_M, total_M, 1.0)[:, None]
        tl.store(out_ptr + out_M[:, None] + d_D[None, :], share_MD.to(out_ptr.dtype.element_ty), mask=is_own_MD)
    else:
        part_M = ((part + place_M - place).to(tl.int64) * H + head_M) * (D + _PART_TAIL)
        tl.store(parts_ptr + part_M[:, None] + d_D[None, :], sum_MD, mask=is_own_MD)
        tl.store(parts_ptr + part_M + D, peak_M, mask=is_own_M)
        tl.store(parts_ptr + part_M + D + 1, total_M, mask=is_own_M)


@triton.jit
def attend_tiles(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    here_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    q_t: tl.tensor,
    q_h: tl.tensor,
    k_p: tl.tensor,
    k_h: tl.tensor,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SCALING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    FAR: tl.constexpr,
    DIVISOR: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """A tile and a key/value head a program. What is read: q [T, H, D], k and v by place, tables, terms."""
    tile_ptr = tiles_ptr + tl.program_id(0) // K * _TILE_SIZE
    kv_head = tl.program_id(0) % K
    num_tokens = tl.load(tile_ptr + 1)
    if num_tokens == 0:
        return
    token, place, start, stop, gap, unplaced, table, part, row = _tile(tile_ptr)
    is_here = unplaced >= 0 if here_ptr is None else tl.load(here_ptr + row) != 0
    token_M, head_M, d_D = tl.arange(0, M) // G, kv_head * G + tl.arange(0, M) % G, tl.arange(0, D_PAD)
    place_M = tl.where(token_M < num_tokens, place + token_M, -1)  # -1: no token
    q_M = q_ptr + (token + token_M).to(tl.int64) * q_t + head_M * q_h
    q_MD = tl.load(q_M[:, None] + d_D[None, :], mask=(place_M >= 0)[:, None] & (d_D < D)[None, :], other=0.0)
    peak_M, total_M = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    sum_MD = tl.zeros([M, D_PAD], tl.float32)
    for at in range(start, stop, N):
        at_N = at + tl.arange(0, N)
        context_N, is_read_N, is_lead_N = _readable(at_N, stop, gap, unplaced, is_here, place, WINDOW)
        block_N = tl.load(blocks_ptr + table + context_N // BLOCK, mask=is_read_N, other=0)
        key_N = (block_N.to(tl.int64) * BLOCK + context_N % BLOCK) * k_p + kv_head * k_h
        is_read_ND = is_read_N[:, None] & (d_D < D)[None, :]
        k_ND = tl.load(k_ptr + key_N[:, None] + d_D[None, :], mask=is_read_ND, other=0.0)
        v_ND = tl.load(v_ptr + key_N[:, None] + d_D[None, :], mask=is_read_ND, other=0.0)
        scores_MN = _products(q_MD, k_ND, SCALING, SOFTCAP, WIDEN)
        if bias_ptr is not None:
            scores_MN = _biased(scores_MN, bias_ptr, head_M, place_M, context_N, unplaced, FAR, DIVISOR)
        scores_MN = _masked(scores_MN, place_M, context_N, is_read_N, is_lead_N, WINDOW, IS_CAUSAL)
        peak_M, total_M, sum_MD = _folded(scores_MN, v_ND, peak_M, total_M, sum_MD, WIDEN)
    _store(out_ptr, parts_ptr, sinks_ptr, place, token, part, place_M, head_M, peak_M, total_M, sum_MD, K * G, D, D_PAD)


@triton.jit
def merge_parts(
    out_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    merges_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    S: tl.constexpr,
) -> None:
    """A token and query head a program: its parts, weighed by what each of them had to share."""
    merge_ptr = merges_ptr + tl.program_id(0) // H * _MERGE_SIZE
    head = tl.program_id(0) % H
    num_parts = tl.load(merge_ptr + 3)
    if num_parts == 0:
        return
    token, first, step = tl.load(merge_ptr), tl.load(merge_ptr + 1), tl.load(merge_ptr + 2)
    i_S, d_D = tl.arange(0, S), tl.arange(0, D_PAD)
    is_part_S, is_head_D = i_S < num_parts, d_D < D
    part_S = parts_ptr + ((first + i_S * step).to(tl.int64) * H + head) * (D + _PART_TAIL)
    peak_S = tl.load(part_S + D, mask=is_part_S, other=float("-inf"))
    peak = tl.max(peak_S, 0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        peak = tl.maximum(peak, sink)
    weight_S = tl.exp(peak_S - peak)  # a token reads at least itself, so some peak is finite
    total = tl.sum(weight_S * tl.load(part_S + D + 1, mask=is_part_S, other=0.0), 0)
    if sinks_ptr is not None:
        total += tl.exp(sink - peak)
    sum_SD = tl.load(part_S[:, None] + d_D[None, :], mask=is_part_S[:, None] & is_head_D[None, :], other=0.0)
    out_D = (tl.sum(weight_S[:, None] * sum_SD, 0) / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token.to(tl.int64) * (H * D) + head * D + d_D, out_D, mask=is_head_D)
