"""Decode rows over their blocks by one kernel call, where a kernel of our own covers them.

Decides which groups the kernel serves; the others stay on `attend`'s path. Owns what the kernel is told beforehand:
where the layers' keys and values lie, and which blocks the rows of the pass that runs read.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

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
        if group.num_tokens > 1 or terms.bias is not None or not terms.is_plain or group.absent:
            return None
        if terms.window is not None and group.unplaced_R is not None:  # a window does not reach what has no position
            return None
        pages = self._pages_of(pool, layer, q_THD)
        if pages is None:
            return None
        key = (id(group), terms.window)
        rows = self._rows.get(key)
        if rows is None:
            rows = self._rows[key] = self._kernel.rows(group.blocks, group.last_RM.flatten(), terms.window)
        return self._kernel.attend(pages, rows, q_THD[group.where], terms.scaling)

    def _pages_of(self, pool: KVPool, layer: int, q_THD: Tensor) -> Pages | None:
        if pool not in self._pages:
            places = [pool.layer(i) for i in range(pool.shape.num_layers)]
            is_ours = q_THD.dtype == places[0][0].dtype and self._kernel.covers(places[0][0], q_THD.shape[1])
            self._pages[pool] = [self._kernel.pages(k, v, pool.block_size) if is_ours else None for k, v in places]
        return self._pages[pool][layer]
