"""Attention of all rows of a step over blocks of keys and values, by Triton kernels.

One launch serves rows of few tokens and one rows of many; a third merges the parts of long contexts. The context is
read where it lies: nothing is gathered, padded or masked beforehand, and nothing outside a row's own positions is read.
Knows neither pools nor plans. The tables that say which rows there are come from `attention_tiles`.

Shapes: `T` tokens of the step, `H` query and `K` key/value heads, `D` head size, `P` places of keys and values.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
from torch import Tensor

from peft_serve.kernels.triton.attention_program import attend_tiles, merge_parts
from peft_serve.kernels.triton.attention_terms import Memory, Scores
from peft_serve.kernels.triton.attention_tiles import Sizes, Tables, power_of_two
from peft_serve.kernels.triton.near import near

_DTYPES: Final = frozenset({torch.float32, torch.bfloat16, torch.float16})
_LARGEST_HEAD: Final = 256
_LARGEST_GROUP: Final = 128
_KEY_BYTES: Final = 16 << 10
"""Of the keys that a program loads at once: values as many, and several loads under way, fit into shared memory."""

_FEWEST_KEYS: Final = 16
"""What a tensor core multiplies at least; more of them in float32, which it does not multiply, spill from registers."""


class TiledAttention:
    """Attention cut into tiles of `sizes`."""

    def __init__(self, sizes: Sizes | None = None) -> None:
        self.sizes = sizes or Sizes()
        self._is_interpreted = bool(triton.knobs.runtime.interpret)

    def covers(self, q_THD: Tensor, keys_PKD: Tensor) -> bool:
        """Whether queries and keys like these are attended to here."""
        (_, num_heads, head), num_kv_heads = q_THD.shape, keys_PKD.shape[1]
        return (
            (q_THD.is_cuda or self._is_interpreted)
            and q_THD.dtype == keys_PKD.dtype
            and q_THD.dtype in _DTYPES
            and keys_PKD.shape[2] == head
            and head % 8 == 0
            and head <= _LARGEST_HEAD
            and num_heads % num_kv_heads == 0
            and num_heads // num_kv_heads <= _LARGEST_GROUP
        )

    def attend(self, tables: Tables, scores: Scores, q_THD: Tensor, memory: Memory, layer: int = 0) -> Tensor:
        """softmax(scores) v of every token, [T, H, D], a new tensor.

        Reads q, keys and values, `tables`, and what `scores` names: all of it on the device, nothing from the host.
        `layer` says whose table of what is absent counts, where there is one.
        """
        if q_THD.stride(2) != 1:
            q_THD = q_THD.contiguous()
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        room, facts = tables.layout.room, self._facts(tables, scores, q_THD, memory)
        parts = tables.scratch(*q_THD.shape[1:])
        for tiles, num_tiles, is_wide in ((tables.narrow, room.narrow, False), (tables.wide, room.wide, True)):
            if not num_tiles:
                continue
            with near(q_THD):
                attend_tiles[(num_tiles * memory.keys_PKD.shape[1],)](
                    q_THD,
                    memory.keys_PKD,
                    memory.values_PKD,
                    out_THD,
                    tiles,
                    tables.blocks,
                    None if tables.here is None else tables.here[layer * room.rows :],
                    scores.slopes_H if scores.by_distance_HX is None else scores.by_distance_HX,
                    scores.sinks_H,
                    parts,
                    *q_THD.stride()[:2],
                    *memory.keys_PKD.stride()[:2],
                    **facts,
                    **self._size(tables.layout.group, q_THD.element_size(), is_wide=is_wide),
                )
        if room.merges:
            self._merge(tables, scores, out_THD, parts)
        return out_THD

    def _merge(self, tables: Tables, scores: Scores, out_THD: Tensor, parts: Tensor) -> None:
        _, num_heads, head = out_THD.shape
        with near(out_THD):
            merge_parts[(tables.layout.room.merges * num_heads,)](
                out_THD,
                parts,
                tables.merges,
                scores.sinks_H,
                H=num_heads,
                D=head,
                D_PAD=_padded(head),
                S=self.sizes.most_splits,
            )

    def _facts(self, tables: Tables, scores: Scores, q_THD: Tensor, memory: Memory) -> dict[str, Any]:
        """What the kernel is compiled for."""
        keys, values = memory.keys_PKD, memory.values_PKD
        assert keys.stride() == values.stride() and keys.stride(2) == 1, "keys and values lie alike"  # noqa: PT018
        by_distance, layout, head = scores.by_distance_HX, tables.layout, q_THD.shape[2]
        return {
            "K": keys.shape[1],
            "G": layout.group,
            "D": head,
            "D_PAD": _padded(head),
            "BLOCK": memory.block_size,
            "N": self._keys(head, q_THD.element_size()),
            "SCALING": scores.scaling,
            "SOFTCAP": scores.softcap or 0.0,
            "WINDOW": layout.window or 0,
            "FAR": 0 if by_distance is None else by_distance.shape[1] // 2,
            "DIVISOR": scores.divisor,
            "IS_CAUSAL": layout.is_causal,
            # The interpreter multiplies bfloat16 as if it were whole numbers.
            "WIDEN": self._is_interpreted and q_THD.dtype == torch.bfloat16,
        }

    def _keys(self, head: int, item_bytes: int) -> int:
        if self.sizes.keys is not None:
            return self.sizes.keys
        most = _FEWEST_KEYS if item_bytes == 4 else _KEY_BYTES // (_padded(head) * item_bytes)
        return min(self.sizes.align, max(_FEWEST_KEYS, most))

    def _size(self, group: int, item_bytes: int, *, is_wide: bool) -> dict[str, int]:
        """Of a program, so that its sums stay in registers."""
        queries = self.sizes.queries(group, is_wide=is_wide)
        num_warps = 4 if queries * item_bytes <= 128 else 8
        return {"M": queries, "num_warps": num_warps, "num_stages": 2 if item_bytes == 4 else 3}


def _padded(head: int) -> int:
    """What a tensor core multiplies at least, or the next power of two."""
    return max(16, power_of_two(head))
