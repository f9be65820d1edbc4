"""Decode rows over their blocks by one kernel call, where a kernel of our own covers them.

Decides which groups the kernel serves; the others stay on `attend`'s path. Owns what the kernel is told beforehand:
where the layers' keys and values lie, and which blocks the rows of the pass that runs read.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from peft_serve.kernels.attention import PagedAttention, Pages, Rows
from peft_serve.model.attend import Terms
from peft_serve.model.pools import KVPool
from peft_serve.model.ragged import Cached


class PagedDecode:
    """Attention of groups with one token a row."""

    def __init__(self, kernel: PagedAttention) -> None:
        self._kernel = kernel
        self._pages: WeakKeyDictionary[KVPool, list[Pages | None]] = WeakKeyDictionary()
        self._rows: dict[tuple[int, int | None], Rows] = {}

    def forget(self) -> None:
        """The pass is over: its groups are gone."""
        self._rows.clear()

    def attend(self, group: Cached, q_THD: Tensor, pool: KVPool, layer: int, terms: Terms) -> Tensor | None:
        """[R, H, D] of a group's rows, or None where the kernel does not cover what they ask."""
        rows = self.rows(group, terms)
        pages = None if rows is None else self.pages(pool, layer, q_THD.shape[1], q_THD.dtype)
        if rows is None or pages is None:
            return None
        return self._kernel.attend(pages, rows, q_THD[group.where], terms.scaling)

    def rows(self, group: Cached, terms: Terms) -> Rows | None:
        """What the kernel is told of a group whose attention it covers."""
        if group.num_tokens > 1 or terms.bias is not None or not terms.is_plain or group.absent:
            return None
        if terms.window is not None and group.unplaced_R is not None:  # a window does not reach what has no position
            return None
        key = (id(group), terms.window)
        rows = self._rows.get(key)
        if rows is None:
            rows = self._rows[key] = self._kernel.rows(group.blocks, group.last_RM.flatten(), terms.window)
        return rows

    def pages(self, pool: KVPool, layer: int, num_heads: int, dtype: torch.dtype) -> Pages | None:
        """What it is told of a layer's keys and values, where it covers queries of such a number and dtype."""
        if pool not in self._pages:
            places = [pool.layer(i) for i in range(pool.shape.num_layers)]
            is_ours = dtype == places[0][0].dtype and self._kernel.covers(places[0][0], num_heads)
            self._pages[pool] = [self._kernel.pages(k, v, pool.block_size) if is_ours else None for k, v in places]
        return self._pages[pool][layer]
