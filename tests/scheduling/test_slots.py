"""The slot ledger: bytes, leases, pins, and least recent use."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from peft_serve.adapters.eviction import CostAware, EvictionPolicy, LeastRecentlyUsed
from peft_serve.adapters.lookups import Lookup
from peft_serve.core import BASE, BASE_SLOT, AdapterId, Footprint
from peft_serve.errors import AdapterUnavailable
from peft_serve.scheduling.slots import Lease, SlotLedger

A, B, C, D = (AdapterId(name) for name in "abcd")


def sized(num_bytes: int) -> Footprint:
    return Footprint(num_bytes=num_bytes)


def full_ledger() -> SlotLedger:
    """Three slots of 10 bytes, a, b, c in order of use, no byte left."""
    ledger = SlotLedger(num_slots=3, max_bytes=30)
    for adapter in (A, B, C):
        assert ledger.place(adapter, sized(10)) is not None
    return ledger


def test_the_base_is_always_in_slot_0() -> None:
    ledger = SlotLedger(num_slots=0, max_bytes=0)
    lease = ledger.acquire(BASE)
    assert (ledger.slot_of(BASE), lease.slot, lease.adapter) == (BASE_SLOT, BASE_SLOT, BASE)
    assert ledger.num_leases == 1
    assert ledger.evict(BASE) is None
    lease.release()
    assert ledger.num_leases == 0
    assert ledger.resident() == ()


def test_slots_are_given_from_1_on() -> None:
    ledger = full_ledger()
    assert [ledger.slot_of(adapter) for adapter in (A, B, C, D)] == [1, 2, 3, None]
    assert ledger.num_bytes == 30
    assert ledger.num_slots == 3


def test_the_least_recently_used_leaves() -> None:
    ledger = full_ledger()
    ledger.acquire(A).release()
    placement = ledger.place(D, sized(10))
    assert placement is not None
    assert placement.evicted == ((2, B),)
    assert placement.slot == 2


def test_several_leave_for_a_large_one() -> None:
    placement = full_ledger().place(D, sized(25))
    assert placement is not None
    assert [adapter for _, adapter in placement.evicted] == [A, B, C]


def test_a_leased_adapter_stays() -> None:
    ledger = full_ledger()
    leases = [ledger.acquire(adapter) for adapter in (A, B, C)]
    assert ledger.place(D, sized(10)) is None
    assert ledger.evict(A) is None
    leases[1].release()
    assert ledger.place(D, sized(20)) is None, "one idle slot of 10 bytes is not enough"
    assert ledger.slot_of(B) == 2, "a placement that fails evicts nobody"
    placement = ledger.place(D, sized(10))
    assert placement is not None
    assert placement.evicted == ((2, B),)


def test_a_pinned_adapter_stays_until_unpinned() -> None:
    ledger = full_ledger()
    ledger.pin(A)
    assert ledger.evict(A) is None
    placement = ledger.place(D, sized(10))
    assert placement is not None
    assert placement.evicted == ((2, B),)
    ledger.unpin(A)
    assert ledger.evict(A) == 1


def test_a_pin_holds_before_the_adapter_has_a_slot() -> None:
    ledger = SlotLedger(num_slots=2, max_bytes=100)
    ledger.pin(A)
    ledger.place(A, sized(1))
    assert [(r.adapter, r.is_pinned) for r in ledger.resident()] == [(A, True)]
    assert ledger.evict(A) is None


@pytest.mark.parametrize(("num_slots", "max_bytes"), [(3, 9), (0, 100)])
def test_what_can_never_fit_is_refused(num_slots: int, max_bytes: int) -> None:
    with pytest.raises(AdapterUnavailable, match="device_adapter_bytes"):
        SlotLedger(num_slots=num_slots, max_bytes=max_bytes).place(A, sized(10))


def test_pins_that_leave_no_room_are_named() -> None:
    ledger = full_ledger()
    for adapter in (A, B, C):
        ledger.pin(adapter)
    with pytest.raises(AdapterUnavailable, match="3 pinned adapters leave no room"):
        ledger.place(D, sized(1))


def test_a_lease_is_given_back_once() -> None:
    lease = full_ledger().acquire(A)
    lease.release()
    with pytest.raises(AssertionError, match="released before"):
        lease.release()


def test_a_leased_adapter_cannot_be_dropped() -> None:
    ledger = full_ledger()
    ledger.pin(B)
    ledger.acquire(A)
    with pytest.raises(AssertionError, match="live leases"):
        ledger.drop(A)
    assert ledger.drop(B) == 2, "a pin does not keep what is not there"


def test_a_request_hits_unless_its_adapter_was_seated_for_it() -> None:
    lookups: list[Lookup] = []
    ledger = SlotLedger(num_slots=2, max_bytes=30, on_lookup=lookups.append)
    ledger.acquire(BASE).release()
    ledger.place(A, sized(10))
    ledger.acquire(A).release()
    ledger.acquire(A).release()
    assert lookups == [
        Lookup(tier="device", adapter=A, is_hit=False, num_bytes=10),
        Lookup(tier="device", adapter=A, is_hit=True, num_bytes=10),
    ]


def test_by_cost_the_one_that_is_used_more_stays() -> None:
    ledger = SlotLedger(num_slots=2, max_bytes=30, policy=CostAware(lambda _adapter, _bytes: 1.0))
    for adapter, num_uses in ((A, 3), (B, 1)):
        ledger.place(adapter, sized(10))
        for _ in range(num_uses):
            ledger.acquire(adapter).release()
    assert list(ledger.idle()) == [B, A]
    assert [one.adapter for one in ledger.resident()] == [A, B], "shown in order of use, whatever the policy"
    placement = ledger.place(C, sized(10))
    assert placement is not None
    assert placement.evicted == ((2, B),)


@pytest.mark.parametrize(("to_make_room", "order"), [(True, [B, C]), (False, [C, B])])
def test_only_evictions_for_room_age_the_others(to_make_room: bool, order: list[AdapterId]) -> None:
    """B was used twice before A left; C comes after it, worth more than B only if A's room was wanted."""
    ledger = SlotLedger(num_slots=3, max_bytes=30, policy=CostAware(lambda _adapter, _bytes: 1.0))
    for adapter, num_uses in ((A, 3), (B, 2)):
        ledger.place(adapter, sized(10))
        for _ in range(num_uses):
            ledger.acquire(adapter).release()
    ledger.evict(A, to_make_room=to_make_room)
    ledger.place(C, sized(10))
    ledger.acquire(C).release()
    assert list(ledger.idle()) == order


class SlotMachine(RuleBasedStateMachine):
    """A model of the ledger: what is where, how often leased, in order of use."""

    SIZES = (1, 4, 7, 12, 3, 9)

    @staticmethod
    def policy() -> EvictionPolicy:
        return LeastRecentlyUsed()

    def __init__(self) -> None:
        super().__init__()
        self.ledger = SlotLedger(num_slots=3, max_bytes=20, policy=self.policy())
        self.leases: list[Lease] = []
        self.pinned: set[AdapterId] = set()
        self.order: list[AdapterId] = []
        self.slots: dict[AdapterId, int] = {}

    adapters = st.integers(0, len(SIZES) - 1)

    def is_idle(self, adapter: AdapterId) -> bool:
        return adapter not in self.pinned and all(lease.adapter != adapter for lease in self.leases)

    def check_order(self, evicted: list[AdapterId]) -> None:
        idle = [adapter for adapter in self.order if self.is_idle(adapter)]
        assert evicted == idle[: len(evicted)], "the least recently used leave first"

    def use(self, adapter: AdapterId) -> None:
        self.order.remove(adapter)
        self.order.append(adapter)

    @rule(index=adapters)
    def place(self, index: int) -> None:
        adapter, size = AdapterId(str(index)), self.SIZES[index]
        if adapter in self.slots:
            return
        kept = [a for a in self.order if not self.is_idle(a)]
        kept_bytes = sum(self.SIZES[int(a)] for a in kept)
        could_fit = len(kept) < 3 and kept_bytes + size <= 20
        try:
            placement = self.ledger.place(adapter, sized(size))
        except AdapterUnavailable:
            assert not could_fit
            return
        assert (placement is not None) == could_fit
        if placement is None:
            return
        self.check_order([evicted for _, evicted in placement.evicted])
        for slot, evicted in placement.evicted:
            assert self.is_idle(evicted)
            assert self.slots.pop(evicted) == slot
            self.order.remove(evicted)
        assert placement.slot not in self.slots.values()
        self.slots[adapter] = placement.slot
        self.order.append(adapter)

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        adapter = data.draw(st.sampled_from(self.order))
        self.leases.append(self.ledger.acquire(adapter))
        self.use(adapter)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.release()
        self.use(lease.adapter)

    @rule(index=adapters, pinned=st.booleans())
    def pin(self, index: int, pinned: bool) -> None:
        adapter = AdapterId(str(index))
        (self.ledger.pin if pinned else self.ledger.unpin)(adapter)
        (self.pinned.add if pinned else self.pinned.discard)(adapter)

    @rule(index=adapters)
    def evict(self, index: int) -> None:
        adapter = AdapterId(str(index))
        slot = self.ledger.evict(adapter)
        assert (slot is not None) == (adapter in self.slots and self.is_idle(adapter))
        if slot is not None:
            assert self.slots.pop(adapter) == slot
            self.order.remove(adapter)

    @invariant()
    def books_agree(self) -> None:
        self.ledger.check()
        assert [r.adapter for r in self.ledger.resident()] == self.order
        assert {r.adapter: r.slot for r in self.ledger.resident()} == self.slots
        assert self.ledger.num_leases == len(self.leases)


TestSlotMachine = SlotMachine.TestCase
TestSlotMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class CostSlotMachine(SlotMachine):
    """The same books under the other policy; who leaves first is that policy's own test."""

    @staticmethod
    def policy() -> EvictionPolicy:
        return CostAware(lambda adapter, num_bytes: 1.0 + int(adapter) * num_bytes % 5)

    def check_order(self, evicted: list[AdapterId]) -> None:
        assert all(self.is_idle(adapter) for adapter in evicted)


TestCostSlotMachine = CostSlotMachine.TestCase
TestCostSlotMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
