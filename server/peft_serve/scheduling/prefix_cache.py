"""The prefix cache: full KV blocks found again by what was computed into them.

A block's label is a digest of everything its keys and values depend on: every token up to its end, and the adapter
that acted on them; and the tenant whose request it is, so that nobody learns by the time of an answer what another
tenant has asked. So requests that begin alike share blocks, running or not, and a preempted request finds its own
again. An adapter that begins to act inside the prompt (aLoRA) shares the blocks before that with the base, and
adapters that are one and the same to the keys and values (`Footprint.kv_key`) share everything.

Knows no tensors. The blocks and their labels are `BlockLedger`'s; which requests may use them is decided here.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

from peft_serve.core import BASE, Footprint, Reading
from peft_serve.scheduling.blocks import BlockLedger
from peft_serve.scheduling.tracked import Tracked

_FROM_THE_LAST: Final = frozenset({None, Reading.SEQUENCE, Reading.LAST})
"""What is read from the last token alone. Other readings want the states of every token, which no block keeps."""


class PrefixCache:
    """Labels the blocks of running requests, and finds the blocks that a request may begin with."""

    def __init__(self, blocks: BlockLedger, *, block_size: int, is_on: bool) -> None:
        """`is_on` is false where blocks tell nothing of a prompt, as those of an encoder-decoder's answer."""
        self._blocks = blocks
        self._block_size = block_size
        self._is_on = is_on

    def find(self, tracked: Tracked) -> tuple[int, ...]:
        """The blocks behind the adapter's own prefix that the request need not compute, and does not hold yet.

        At least one token is left to compute: what the request wants is read from its last one.
        """
        footprint = tracked.footprint
        if footprint is None or not self._allows(footprint) or tracked.request.reading not in _FROM_THE_LAST:
            return ()
        if tracked.wants_prompt:
            return ()  # what follows each token is read from that token
        first = footprint.num_prefix_tokens // self._block_size
        end = (footprint.num_prefix_tokens + len(tracked.tokens) - 1) // self._block_size
        return self._blocks.find(self._labels(tracked, footprint, end - first))

    def keep(self, tracked: Tracked) -> None:
        """Label the blocks that the request has filled since it was asked last."""
        footprint = tracked.footprint
        assert footprint is not None, f"request {tracked.id} ran on an adapter that nobody knew"
        first = footprint.num_prefix_tokens // self._block_size
        end = (footprint.num_prefix_tokens + tracked.num_computed) // self._block_size
        if first + tracked.num_labelled >= end or not self._allows(footprint):
            return
        labels = self._labels(tracked, footprint, end - first)
        for place in range(tracked.num_labelled, end - first):
            self._blocks.label(tracked.table[first + place], labels[place])
        tracked.num_labelled = end - first

    def _allows(self, footprint: Footprint) -> bool:
        return self._is_on and footprint.is_causal

    def _labels(self, tracked: Tracked, footprint: Footprint, num_blocks: int) -> Sequence[bytes]:
        """The labels of the request's first blocks behind the adapter's prefix. They grow with its tokens."""
        labels = tracked.labels
        size, prefix = self._block_size, footprint.num_prefix_tokens
        first = prefix // size
        while len(labels) < num_blocks:
            start = (first + len(labels)) * size
            tokens = tracked.tokens[max(start - prefix, 0) : start + size - prefix]
            digest = blake2b(labels[-1] if labels else _whose(tracked), digest_size=32)
            digest.update(_actor(tracked, footprint, start, start + size))
            digest.update(array("q", tokens).tobytes())
            labels.append(digest.digest())
        return labels[:num_blocks]


def _whose(tracked: Tracked) -> bytes:
    """What the labels of a tenant's requests begin with: each depends on the one before it, so all of them differ."""
    tenant = tracked.request.tenant.encode()
    return f"{len(tenant)}|".encode() + tenant if tenant else b""


def _actor(tracked: Tracked, footprint: Footprint, start: int, stop: int) -> bytes:
    """Who acts on the context positions [start, stop), and from which of them on."""
    name = footprint.kv_key or tracked.adapter
    if name == BASE or tracked.active_from >= stop:
        return f"{BASE}|".encode()
    return f"{name}+{max(tracked.active_from - start, 0)}|".encode()
