"""What stands in front of a request's tokens: KV prefixes and soft prompts of the adapters in slots.

Owns the soft prompts of resident adapters on a model with an encoder, where they go in front of every new
source, and the prefixes that an encoder reads, which keeps no keys and values, or that stand in front of an encoded
source. Everywhere else virtual tokens become keys and values in the blocks of an `Install`, once, and requests share
those blocks.
"""

from __future__ import annotations

from torch import Tensor

from peft_serve.adapters.primitives import Adapter, KVPrefix
from peft_serve.core import Install
from peft_serve.model.base import ResidentBase
from peft_serve.model.passes import Passes
from peft_serve.model.pools import KVPool
from peft_serve.model.ragged import Front


class VirtualTokens:
    """Places the virtual tokens of adapters, and remembers the soft prompts of an encoder by slot."""

    def __init__(self, base: ResidentBase, passes: Passes, pool: KVPool) -> None:
        self._base = base
        self._passes = passes
        self._pool = pool
        self._prompts: dict[int, Tensor] = {}
        self._bare: set[int] = set()
        self._fronts: dict[int, Front] = {}
        self._crosses: dict[int, Front] = {}
        self._absent: dict[int, frozenset[int]] = {}

    def place(self, install: Install, adapter: Adapter) -> None:
        """Make an adapter's virtual tokens ready; its sites are already in the slot.

        An adapter with both has its KV prefix first, and the soft prompt reads it, as a request would.
        """
        num_prefix = 0
        shape = self._base.shape
        source = adapter.prefix if shape.is_encoder else adapter.source_prefix
        if source is not None:
            self._fronts[install.slot] = self._front(source)
        if adapter.cross_prefix is not None:
            self._crosses[install.slot] = self._front(adapter.cross_prefix)
        if adapter.prefix is not None and not shape.is_encoder:
            num_prefix = adapter.prefix.keys_LHPD.shape[2]
            self._pool.store(install.blocks, adapter.prefix.keys_LHPD, adapter.prefix.values_LHPD)
            self._absent[install.slot] = adapter.prefix.absent
        if adapter.prompt is None:
            return
        embeddings = adapter.prompt.embeddings_PD.to(device=self._base.device, dtype=self._base.dtype)
        if shape.is_encoder_decoder or shape.is_encoder:
            self._prompts[install.slot] = embeddings
            if adapter.prompt.is_bare:
                self._bare.add(install.slot)
        else:
            self._passes.read_prompt(install.slot, embeddings, start=num_prefix, blocks=install.blocks)

    def remove(self, slot: int) -> None:
        """Forget the slot. Its blocks are the scheduler's to give away."""
        self._prompts.pop(slot, None)
        self._bare.discard(slot)
        self._fronts.pop(slot, None)
        self._crosses.pop(slot, None)
        self._absent.pop(slot, None)

    def of(self, slot: int) -> Tensor | None:
        """The embeddings [P, d] in front of a new source of this slot."""
        return self._prompts.get(slot)

    def is_bare(self, slot: int) -> bool:
        """Whether this slot's soft prompt enters the first layer as it is."""
        return slot in self._bare

    def front(self, slot: int) -> Front | None:
        """The keys and values in front of what an encoder reads for this slot."""
        return self._fronts.get(slot)

    def cross(self, slot: int) -> Front | None:
        """The keys and values in front of an encoded source of this slot."""
        return self._crosses.get(slot)

    def absent(self, slot: int) -> frozenset[int]:
        """Layers of the decoder that have nothing of this slot's prefix."""
        return self._absent.get(slot, frozenset())

    def _front(self, prefix: KVPrefix) -> Front:
        keys, values = (
            x.to(device=self._base.device, dtype=self._base.dtype) for x in (prefix.keys_LHPD, prefix.values_LHPD)
        )
        return Front(keys, values, prefix.advances_positions, prefix.absent)
