"""Residency: an adapter's way to the device, and its KV prefix there.

    asked --> ready --> seated (Install planned) --> resident --> out

Owns what the next step must install and remove, and says which idle adapters give their blocks (`AdapterBlocks`) when
requests or other adapters need them. An adapter's host copy must stay from `ask` until its install was run (`claims`);
out of its slot it has to be asked for again. Leases are `SlotLedger`'s; files and tensors are unknown here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from peft_serve.core import BASE, AdapterId, Footprint, Install, Step
from peft_serve.errors import AdapterUnavailable
from peft_serve.scheduling.adapter_blocks import AdapterBlocks
from peft_serve.scheduling.blocks import BlockLedger
from peft_serve.scheduling.limits import Limits
from peft_serve.scheduling.slots import SlotLedger

_NO_FOOTPRINT = Footprint(num_bytes=0)
_PINNED_RETRY_S = 30.0  # pins are for operators to lift


class Residency:
    """Which adapters are asked for, ready, or in a slot."""

    def __init__(self, limits: Limits, slots: SlotLedger, blocks: BlockLedger) -> None:
        self._slots = slots
        self._blocks = blocks
        self._asked: set[AdapterId] = set()
        self._ready: dict[AdapterId, Footprint] = {}
        self._seated: dict[AdapterId, Footprint] = {BASE: _NO_FOOTPRINT}
        self._own = AdapterBlocks(limits, blocks)
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
        return self._own.num_prefix(footprint)

    def num_adapter_blocks(self, adapter: AdapterId, footprint: Footprint) -> int:
        """Blocks that the adapter would have to be given: none if it is seated."""
        return 0 if adapter in self._seated else self._own.num_wanted(footprint)

    def prefix(self, adapter: AdapterId) -> tuple[int, ...]:
        """The blocks of a seated adapter's KV prefix."""
        return self._own.prefix(adapter)

    def seat(self, adapter: AdapterId) -> bool:
        """Give a ready adapter its slot and its blocks; False while leases leave no slot, or no neighbouring blocks.

        The blocks must be there (`has_room`). Raises `AdapterUnavailable` when waiting cannot help.
        """
        if adapter in self._seated:
            return True
        footprint = self._ready[adapter]
        if not self._has_runs(footprint):
            return False
        placement = self._slots.place(adapter, footprint)
        if placement is None:
            return False
        for slot, evicted in placement.evicted:
            self._clear(evicted, slot)
        del self._ready[adapter]
        self._make_fit(footprint)
        pages = self._own.take(adapter, footprint)
        self._seated[adapter] = footprint
        blocks = self._own.prefix(adapter)
        self._installs[adapter] = Install(slot=placement.slot, adapter=adapter, blocks=blocks, pages=pages)
        return True

    def _has_runs(self, footprint: Footprint) -> bool:
        """Whether neighbouring blocks are there for what is larger than one, if every idle adapter left."""
        if max(footprint.runs, default=0) <= 1:
            return True
        if self._own.fits_without(footprint, self._giving()):
            return True
        pinned = [adapter for adapter in self._seated if self._slots.is_pinned(adapter)]
        if not self._own.could_fit_beside(footprint, pinned):
            raise AdapterUnavailable(
                f"the adapter needs {max(footprint.runs)} neighbouring KV blocks, and this server has none beside its "
                "pinned adapters: unpin one, or start the server with more (device_memory_bytes)",
                retry_after_s=_PINNED_RETRY_S,
            )
        return False

    def _make_fit(self, footprint: Footprint) -> None:
        """Have idle adapters leave, in the eviction policy's order, until the adapter's blocks are free."""
        giving = iter(self._giving())
        while not self._own.fits(footprint):
            leaving = next(giving, None)
            assert leaving is not None, "no blocks for an adapter: ask has_room first"
            self.evict(leaving, to_make_room=True)

    # -- blocks that idle adapters can be made to give

    def _giving(self) -> list[AdapterId]:
        """Idle adapters that have blocks, in the eviction policy's order."""
        return [adapter for adapter in self._slots.idle() if self._own.of(adapter)] if self._own.num_held else []

    @property
    def most_of_requests(self) -> int:
        """Blocks that all requests together may hold."""
        return self._own.most_of_requests

    @property
    def usage(self) -> float:
        """Share of the pool that requests could not be given now, from 0 to 1: idle adapters would leave for them."""
        idle = sum(len(self._own.pages(adapter)) for adapter in self._giving())
        return 1.0 - (self._blocks.num_free + idle) / self._blocks.capacity

    def has_room(self, num_blocks: int, num_adapter_blocks: int, *, besides: AdapterId) -> bool:
        """Whether so many blocks are there for a request, and for its adapter, if idle adapters leave (not
        `besides`)."""
        if num_blocks > self._own.num_left:
            return False
        return num_blocks + num_adapter_blocks <= self._num_available(besides)

    def _num_available(self, besides: AdapterId = BASE) -> int:
        """Free blocks, and those of idle adapters (not of `besides`)."""
        idle = sum(len(self._own.of(adapter)) for adapter in self._giving() if adapter != besides)
        return self._blocks.num_free + idle

    def num_pinned_blocks(self, *, besides: AdapterId) -> int:
        """Blocks of pinned adapters: waiting does not free them."""
        if not self._own.num_held:
            return 0
        pinned = (adapter for adapter in self._seated if adapter != besides and self._slots.is_pinned(adapter))
        return sum(len(self._own.of(adapter)) for adapter in pinned)

    def make_free(self, num_blocks: int) -> bool:
        """Have so many blocks free for requests, emptying idle adapters' slots if need be (in the eviction policy's
        order)."""
        if num_blocks > self._own.num_left:
            return False
        if self._blocks.num_free >= num_blocks:
            return True
        if self._num_available() < num_blocks:
            return False
        for adapter in self._giving():
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
        self._own.release(adapter)

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
        yield from self._own.holders()

    def check(self) -> None:
        """Assert that the books agree with the slot ledger's."""
        in_slots = {resident.adapter for resident in self._slots.resident()}
        assert in_slots | {BASE} == self._seated.keys(), "seats and slots differ"
        assert not self._asked & self._ready.keys(), "an adapter is asked for and ready"
        assert not self._seated.keys() & (self._asked | self._ready.keys()), "a seated adapter is on the way"
        assert self._installs.keys() <= in_slots, "an install has no slot"
        self._own.check({adapter: self._seated[adapter] for adapter in in_slots})
