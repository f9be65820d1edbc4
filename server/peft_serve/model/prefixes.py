"""What stands in front of a request's tokens: KV prefixes and soft prompts of the adapters in slots.

Owns the soft prompts of resident adapters on a model with an encoder, where they go in front of every new
source, and the prefixes on a model that is nothing else, which keeps no keys and values. Everywhere else virtual
tokens become keys and values in the blocks of an `Install`, once, and requests share those blocks.
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
        self._fronts: dict[int, Front] = {}

    def place(self, install: Install, adapter: Adapter) -> None:
        """Make an adapter's virtual tokens ready; its sites are already in the slot.

        An adapter with both has its KV prefix first, and the soft prompt reads it, as a request would.
        """
        num_prefix = 0
        shape = self._base.shape
        if adapter.prefix is not None and shape.is_encoder:
            self._fronts[install.slot] = self._front(adapter.prefix)
        elif adapter.prefix is not None:
            num_prefix = adapter.prefix.keys_LHPD.shape[2]
            self._pool.store(install.blocks, adapter.prefix.keys_LHPD, adapter.prefix.values_LHPD)
        if adapter.prompt is None:
            return
        embeddings = adapter.prompt.embeddings_PD.to(device=self._base.device, dtype=self._base.dtype)
        if shape.is_encoder_decoder or shape.is_encoder:
            self._prompts[install.slot] = embeddings
        else:
            self._passes.read_prompt(install.slot, embeddings, start=num_prefix, blocks=install.blocks)

    def remove(self, slot: int) -> None:
        """Forget the slot. Its blocks are the scheduler's to give away."""
        self._prompts.pop(slot, None)
        self._fronts.pop(slot, None)

    def of(self, slot: int) -> Tensor | None:
        """The embeddings [P, d] in front of a new source of this slot."""
        return self._prompts.get(slot)

    def front(self, slot: int) -> Front | None:
        """The keys and values in front of a row of this slot, on an encoder."""
        return self._fronts.get(slot)

    def _front(self, prefix: KVPrefix) -> Front:
        keys, values = (
            x.to(device=self._base.device, dtype=self._base.dtype) for x in (prefix.keys_LHPD, prefix.values_LHPD)
        )
        return Front(keys, values, prefix.advances_positions)
