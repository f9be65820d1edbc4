"""Attention of one group of rows: softmax(scaling * q k^T [capped] + mask) v, fast and slow.

`attend_fresh` and `attend_cached` are the fast ones; `attend_reference` computes the same row by row and
token by token in float32, and is the truth the tests hold them to. Nothing here knows a model or a step.

Shapes: `T` tokens of the step, `R` rows of a group, `M` tokens of a row, `C` context positions, `H` query
heads, `K` key/value heads, `G` = H / K, `D` head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from peft_serve.model.pools import KVPool, places_of
from peft_serve.model.ragged import Bias, Cached, Fresh, Plan, Span

CHUNK_BYTES: Final = 4 << 20
"""Keys and values that are gathered for one call on a CPU, for each of its threads (docs/decisions/0008)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a layer asks of its attention beside queries, keys and values."""

    scaling: float
    softcap: float | None = None  # scores become cap * tanh(scores / cap) (Gemma-2)
    window: int | None = None  # a token reads itself and the window - 1 positions before it
    bias: Bias | None = None
    sinks_H: Tensor | None = None  # a score of each head that takes its share and gives nothing (gpt-oss)

    @property
    def is_plain(self) -> bool:
        """Whether the softmax is over scores and mask alone."""
        return self.softcap is None and self.sinks_H is None


def attend_fresh(group: Fresh, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: int, terms: Terms) -> Tensor:
    """Rows whose keys and values are all in this step, or in front of it. Gives [R * M, H, D]."""
    if not group.is_causal and terms.window is not None:
        raise ValueError("attention over a window in both directions is not served")
    rows, length = group.num_rows, group.num_tokens
    num_heads, num_kv_heads = q_THD.shape[1], k_TKD.shape[1]
    k, v = (x[group.where].view(rows, length, num_kv_heads, -1).transpose(1, 2) for x in (k_TKD, v_TKD))
    if group.front is not None and layer not in group.front.absent:
        assert not group.is_causal, "only an encoder's rows have something in front"
        k, v = (_behind(x, front, layer) for x, front in ((k, group.front.keys_LHPD), (v, group.front.values_LHPD)))
    is_windowed = group.is_causal and terms.window is not None and terms.window < length
    if terms.bias is None and terms.is_plain and not is_windowed:
        q = q_THD[group.where].view(rows, length, num_heads, -1).transpose(1, 2)
        out = scaled_dot_product_attention(
            q, k, v, is_causal=group.is_causal, scale=terms.scaling, enable_gqa=num_heads != num_kv_heads
        )
        return out.transpose(1, 2).flatten(0, 1)
    mask = group.mask(terms.window if is_windowed else None, terms.bias, q_THD, layer)
    return _attend_masked(q_THD[group.where], k, v, mask, terms, rows)


def _behind(own_RKMD: Tensor, front_LKPD: Tensor, layer: int) -> Tensor:
    """Each row's own behind what all rows have in front."""
    return torch.cat((front_LKPD[layer].expand(len(own_RKMD), -1, -1, -1), own_RKMD), dim=2)


def attend_cached(
    group: Cached, q_THD: Tensor, pool: KVPool, layer: int, terms: Terms, *, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """Rows that read their context from blocks. Gives [R * M, H, D].

    On a CPU so many rows at a time that the copies of their keys and values stay in its cache: they are written and
    read back at once, and one large copy is paid for in page faults too.
    """
    mask = group.mask(terms.window, terms.bias, q_THD, layer)
    q_NHD = q_THD[group.where]
    at_once = group.num_rows
    if q_THD.device.type == "cpu":
        width = group.blocks.shape[0] // group.num_rows
        at_once = max(1, torch.get_num_threads() * chunk_bytes // (width * pool.bytes_per_block))
    if at_once >= group.num_rows:
        k, v = pool.gather(layer, group.blocks, group.num_rows)
        return _attend_masked(q_NHD, k, v, mask, terms, group.num_rows)
    parts = []
    blocks_by_row = torch.split(group.blocks.view(group.num_rows, -1), at_once)
    q_by_row = torch.split(q_NHD, at_once * group.num_tokens)
    for blocks, q, part in zip(blocks_by_row, q_by_row, torch.split(mask, at_once), strict=True):
        k, v = pool.gather(layer, blocks.flatten(), len(blocks))
        parts.append(_attend_masked(q, k, v, part, terms, len(blocks)))
    return torch.cat(parts)


def _attend_masked(q_NHD: Tensor, k_RKCD: Tensor, v_RKCD: Tensor, mask: Tensor, terms: Terms, num_rows: int) -> Tensor:
    """One call for all rows; the G query heads of a key/value head stand as G * M queries of that head."""
    num_tokens, num_heads, _ = q_NHD.shape
    length, num_kv_heads = num_tokens // num_rows, k_RKCD.shape[1]
    group = num_heads // num_kv_heads
    q = q_NHD.view(num_rows, length, num_kv_heads, group, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
    if mask.shape[1] > 1:
        mask = mask.view(mask.shape[0], num_kv_heads, group * length, -1)
    elif length > 1 and group > 1:
        mask = mask.repeat(1, 1, group, 1)
    if terms.is_plain:
        out = scaled_dot_product_attention(q, k_RKCD, v_RKCD, attn_mask=mask, scale=terms.scaling)
    else:
        scores = q @ k_RKCD.transpose(2, 3) * terms.scaling
        if terms.softcap is not None:
            scores = torch.tanh(scores / terms.softcap) * terms.softcap
        out = _shares(scores + mask, terms.sinks_H).to(q.dtype) @ v_RKCD
    by_head = out.view(num_rows, num_kv_heads, group, length, -1)
    return by_head.permute(0, 3, 1, 2, 4).reshape(num_tokens, num_heads, -1)


def _shares(scores_RKNC: Tensor, sinks_H: Tensor | None) -> Tensor:
    """The softmax in float32, of the keys alone where a sink takes a share."""
    if sinks_H is None:
        return torch.softmax(scores_RKNC, dim=-1, dtype=torch.float32)
    rows, heads, queries, _ = scores_RKNC.shape
    by_query = sinks_H.repeat_interleave(heads * queries // len(sinks_H)).view(1, heads, queries, 1)
    with_sink = torch.cat((scores_RKNC, by_query.expand(rows, -1, -1, -1).to(scores_RKNC.dtype)), dim=-1)
    return torch.softmax(with_sink, dim=-1, dtype=torch.float32)[..., :-1]


def attend_reference(
    plan: Plan, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, pool: KVPool | None, layer: int, terms: Terms
) -> Tensor:
    """The slow truth, in float32, of a whole plan: every token by itself. Gives [T, H, D].

    A span with `num_source` reads the first `num_source` positions of its blocks; another span with blocks
    reads its blocks up to the token; one without blocks reads the whole row, which is in k and v.
    """
    out = torch.empty_like(q_THD)
    at = 0
    for span in plan.spans:
        row_k, row_v = (x[at : at + span.num_tokens] for x in (k_TKD, v_TKD))
        if span.front is not None and layer not in span.front.absent:
            fronts = (span.front.keys_LHPD[layer], span.front.values_LHPD[layer])
            row_k, row_v = (torch.cat((f.transpose(0, 1), x)) for f, x in zip(fronts, (row_k, row_v), strict=True))
        for i in range(span.num_tokens):
            place = span.start + i
            readable = list(range(len(row_k)))
            if span.blocks:
                assert pool is not None, "rows with blocks need a pool"
                readable = _readable(span, place, layer, terms.window)
                stop = readable[-1] + 1
                places = places_of(span.blocks, 0, stop, pool.block_size)
                row_k, row_v = (x[places][readable] for x in pool.layer(layer))
            keys = torch.tensor(readable, device=q_THD.device)
            bias = None if terms.bias is None else terms.bias.of(keys - place + span.num_unplaced, keys)
            out[at + i] = _one_token(q_THD[at + i], row_k, row_v, bias, terms)
        at += span.num_tokens
    return out


def _readable(span: Span, place: int, layer: int, window: int | None) -> list[int]:
    """The context positions that the token at `place` reads."""
    stop = span.num_source or place + 1
    first = max(0, stop - window) if window is not None and not span.num_source else 0
    in_front = [] if layer in span.absent else list(range(span.num_unplaced))
    return in_front + list(range(max(first, span.num_unplaced), stop))


def _one_token(q_HD: Tensor, k_CKD: Tensor, v_CKD: Tensor, bias_HC: Tensor | None, terms: Terms) -> Tensor:
    group = q_HD.shape[0] // k_CKD.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k_CKD, v_CKD))
    scores = torch.einsum("hd,chd->hc", q_HD.float(), k) * terms.scaling
    if terms.softcap is not None:
        scores = terms.softcap * torch.tanh(scores / terms.softcap)
    if bias_HC is not None:
        scores = scores + bias_HC.float()
    if terms.sinks_H is not None:
        scores = torch.cat((scores, terms.sinks_H.float()[:, None]), dim=-1)
    shares = scores.softmax(-1)[:, : len(v)]
    return torch.einsum("hc,chd->hd", shares, v).to(q_HD.dtype)
