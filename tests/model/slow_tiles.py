"""The attention kernel without Triton: what its tables say, token by token in plain torch.

Interpreted, the kernel itself takes a hundred times as long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_serve.kernels.triton.attention_numbers import TILE_SIZE
from peft_serve.kernels.triton.attention_terms import Memory, Scores
from peft_serve.kernels.triton.attention_tiles import Sizes, Tables
from tests.model.tape import on_device


class SlowTiles:
    """Stands in for `TiledAttention`, where nothing carries no position."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes

    def covers(self, q_THD: Tensor, keys_PKD: Tensor) -> bool:
        return q_THD.dtype == keys_PKD.dtype

    def attend(self, tables: Tables, scores: Scores, q_THD: Tensor, memory: Memory, layer: int = 0) -> Tensor:
        out_THD = torch.empty_like(q_THD)
        on_device(lambda: _attend(tables, scores, q_THD, memory, out_THD))
        assert layer >= 0
        return out_THD


def _attend(tables: Tables, scores: Scores, q_THD: Tensor, memory: Memory, out_THD: Tensor) -> None:
    layout, size = tables.layout, memory.block_size
    read: dict[tuple[int, int], list[int]] = {}  # context positions by token and its own position
    blocks_of: dict[int, list[int]] = {}
    for tile in torch.cat((tables.narrow, tables.wide)).view(-1, TILE_SIZE).tolist():
        token, num_tokens, place, first, stop, gap, unplaced, block = tile[:8]
        contexts = [at if at < unplaced else at + gap for at in range(first, stop)]
        for i in range(num_tokens):
            near = [at for at in contexts if layout.window is None or at > place + i - layout.window]
            blocks_of[token + i] = tables.blocks[block:].tolist()
            read.setdefault((token + i, place + i), []).extend(
                at for at in near if not layout.is_causal or at <= place + i
            )
    for (token, place), contexts in read.items():
        blocks = blocks_of[token]
        places = [blocks[at // size] * size + at % size for at in contexts]
        keys, values = (x[places].repeat_interleave(layout.group, 1) for x in (memory.keys_PKD, memory.values_PKD))
        each_HC = torch.einsum("hd,chd->hc", q_THD[token], keys) * scores.scaling
        if scores.softcap is not None:
            each_HC = scores.softcap * torch.tanh(each_HC / scores.softcap)
        if scores.by_distance_HX is not None:
            far = scores.by_distance_HX.shape[1] // 2
            each_HC = each_HC + scores.by_distance_HX[:, (torch.tensor(contexts) - place).clamp(-far, far) + far]
        out_THD[token] = torch.einsum("hc,chd->hd", each_HC.softmax(-1), values)
