"""Residency: an adapter's way to the device, and its KV prefix there.

    asked --> ready --> seated (Install planned) --> resident --> out

Owns the blocks of every seated adapter's prefix and what the next step must install and remove. An adapter's
host copy must stay from `ask` until its install was run (`claims`); out of its slot it has to be asked for
again. Leases are `SlotLedger`'s; files and tensors are unknown here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from peft_serve.core import BASE, AdapterId, Footprint, Install, Step
from peft_serve.scheduling.blocks import BlockLedger
from peft_serve.scheduling.limits import Limits
from peft_serve.scheduling.slots import SlotLedger

_NO_FOOTPRINT = Footprint(num_bytes=0)


class Residency:
    """Which adapters are asked for, ready, or in a slot."""

    def __init__(self, limits: Limits, slots: SlotLedger, blocks: BlockLedger) -> None:
        self._limits = limits
        self._slots = slots
        self._blocks = blocks
        self._asked: set[AdapterId] = set()
        self._ready: dict[AdapterId, Footprint] = {}
        self._seated: dict[AdapterId, Footprint] = {BASE: _NO_FOOTPRINT}
        self._prefixes: dict[AdapterId, tuple[int, ...]] = {}
        self._installs: dict[AdapterId, Install] = {}
        self._running_installs: frozenset[AdapterId] = frozenset()
        self._removes: set[int] = set()

    # -- the way in

    def is_asked(self, adapter: AdapterId) -> bool:
        return adapter in self._asked

    def is_cold(self, adapter: AdapterId) -> bool:
        """Whether nobody has asked for the adapter and it is neither ready nor seated."""
        return adapter not in self._seated and adapter not in self._ready and adapter not in self._asked

    @property
    def num_on_the_way(self) -> int:
        """Adapters asked for or ready, without a slot yet."""
        return len(self._asked) + len(self._ready)

    @property
    def claims(self) -> frozenset[AdapterId]:
        """Adapters whose host copy must stay."""
        return frozenset((*self._asked, *self._ready, *self._installs, *self._running_installs))

    def footprint(self, adapter: AdapterId) -> Footprint | None:
        """The adapter's footprint if it can be used now (seated, or ready to be)."""
        seated = self._seated.get(adapter)
        return self._ready.get(adapter) if seated is None else seated

    def is_seated(self, adapter: AdapterId) -> bool:
        return adapter in self._seated

    def ask(self, adapter: AdapterId) -> None:
        assert self.is_cold(adapter), f"adapter {adapter} is asked for twice"
        self._asked.add(adapter)

    def make_ready(self, adapter: AdapterId, footprint: Footprint) -> None:
        """The host has the adapter."""
        self._asked.discard(adapter)
        if adapter not in self._seated:
            self._ready[adapter] = footprint

    def forget(self, adapter: AdapterId) -> None:
        """The adapter's load failed, or nobody waits for it: the host may drop it."""
        self._asked.discard(adapter)
        self._ready.pop(adapter, None)

    def forget_unwanted(self, wanted: Iterable[AdapterId]) -> None:
        """Let go of ready adapters that nobody waits for any more."""
        if self._ready:
            for adapter in self._ready.keys() - set(wanted):
                del self._ready[adapter]

    def num_prefix_blocks(self, footprint: Footprint) -> int:
        return self._limits.blocks_for(footprint.num_prefix_tokens)

    def prefix(self, adapter: AdapterId) -> tuple[int, ...]:
        """The blocks of a seated adapter's KV prefix."""
        return self._prefixes.get(adapter, ())

    def seat(self, adapter: AdapterId) -> bool:
        """Give a ready adapter its slot and prefix blocks; False while leases leave no slot.

        The blocks must be there (`num_available`). Raises `AdapterUnavailable` when waiting cannot help.
        """
        if adapter in self._seated:
            return True
        footprint = self._ready[adapter]
        placement = self._slots.place(adapter, footprint)
        if placement is None:
            return False
        for slot, evicted in placement.evicted:
            self._clear(evicted, slot)
        del self._ready[adapter]
        num_blocks = self.num_prefix_blocks(footprint)
        blocks = self._blocks.allocate(num_blocks) if self.make_free(num_blocks) else None
        assert blocks is not None, f"no blocks for the prefix of adapter {adapter}: ask num_available first"
        self._seated[adapter] = footprint
        if blocks:
            self._prefixes[adapter] = blocks
        self._installs[adapter] = Install(slot=placement.slot, adapter=adapter, blocks=blocks)
        return True

    # -- blocks that idle adapters can be made to give

    def num_available(self, *, besides: AdapterId = BASE) -> int:
        """Free blocks, and those of idle adapters' prefixes (not of `besides`)."""
        if not self._prefixes:
            return self._blocks.num_free
        idle = (a for a in self._slots.idle() if a != besides)
        return self._blocks.num_free + sum(len(self.prefix(adapter)) for adapter in idle)

    def num_pinned_blocks(self, *, besides: AdapterId) -> int:
        """Blocks of pinned adapters' prefixes: waiting does not free them."""
        return sum(len(b) for a, b in self._prefixes.items() if a != besides and self._slots.is_pinned(a))

    def make_free(self, num_blocks: int) -> bool:
        """Have so many blocks free, emptying idle adapters' slots if need be (in the eviction policy's order)."""
        if self._blocks.num_free >= num_blocks:
            return True
        if self.num_available() < num_blocks:
            return False
        for adapter in [a for a in self._slots.idle() if a in self._prefixes]:
            if self._blocks.num_free >= num_blocks:
                break
            self.evict(adapter, to_make_room=True)
        return True

    # -- the way out

    def evict(self, adapter: AdapterId, *, to_make_room: bool = False) -> bool:
        """Empty the adapter's slot with the next step; False while it is leased or pinned, or has none."""
        slot = self._slots.evict(adapter, to_make_room=to_make_room)
        if slot is None:
            return False
        self._clear(adapter, slot)
        return True

    def drop(self, adapter: AdapterId) -> None:
        """The adapter is not in its slot after all. Nobody leases it any more."""
        if adapter in self._seated:
            self._clear(adapter, self._slots.drop(adapter))

    def _clear(self, adapter: AdapterId, slot: int) -> None:
        del self._seated[adapter]
        self._installs.pop(adapter, None)
        self._removes.add(slot)
        self._blocks.release(self._prefixes.pop(adapter, ()))

    # -- what the step is told

    def hand_over(self) -> tuple[tuple[int, ...], tuple[Install, ...]]:
        """The removes and installs of the step that is about to run."""
        removes, installs = tuple(sorted(self._removes)), tuple(self._installs.values())
        self._removes.clear()
        self._running_installs = frozenset(self._installs)
        self._installs.clear()
        return removes, installs

    def confirm(self) -> None:
        """The step has run: the host copies of what it installed may go."""
        self._running_installs = frozenset()

    def undo(self, step: Step) -> None:
        """The step raised, and nobody knows how far it came: empty every slot it was to change.

        A slot that was emptied already is emptied again: removing from an empty slot does nothing.
        """
        for install in step.installs:
            self.drop(install.adapter)
        self._removes.update(step.removes)
        self.confirm()

    def holders(self) -> Iterator[tuple[int, ...]]:
        """The block tables held here."""
        yield from self._prefixes.values()

    def check(self) -> None:
        """Assert that the books agree with the slot ledger's."""
        in_slots = {resident.adapter for resident in self._slots.resident()}
        assert in_slots | {BASE} == self._seated.keys(), "seats and slots differ"
        assert not self._asked & self._ready.keys(), "an adapter is asked for and ready"
        assert not self._seated.keys() & (self._asked | self._ready.keys()), "a seated adapter is on the way"
        assert self._installs.keys() <= in_slots, "an install has no slot"
        assert self._prefixes.keys() <= in_slots, "a prefix has no slot"
        for adapter, blocks in self._prefixes.items():
            assert len(blocks) == self.num_prefix_blocks(self._seated[adapter]), "a prefix has the wrong size"
