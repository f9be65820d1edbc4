"""Slots: which adapter stands where on the device, and who needs it to stay.

Owns the books of the device's adapter memory: bytes, leases and pins. A slot with a live lease is never taken; among
the others an eviction policy says who leaves first. Slot 0 is the base model: always there, free, and leased like any
other so that every request is counted the same way. Knows no tensors: the runner does what `Step.installs` and
`Step.removes` say.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from peft_serve.adapters.eviction import EvictionPolicy, LeastRecentlyUsed
from peft_serve.adapters.lookups import Lookup, OnLookup, unobserved
from peft_serve.core import BASE, BASE_SLOT, AdapterId, Footprint
from peft_serve.errors import AdapterUnavailable

_PINNED_RETRY_S = 30.0  # pins are for operators to lift


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where an adapter goes, and who leaves for it: (slot, adapter) pairs."""

    slot: int
    evicted: tuple[tuple[int, AdapterId], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """An adapter on the device, for people and metrics."""

    adapter: AdapterId
    slot: int
    num_bytes: int
    num_leases: int
    is_pinned: bool


@dataclass(slots=True, eq=False)
class _Seat:
    adapter: AdapterId
    slot: int
    num_bytes: int
    leases: int = 0
    is_fresh: bool = True  # nobody has leased it yet


class Lease:
    """The right to find an adapter in its slot, until `release`."""

    __slots__ = ("_is_live", "_ledger", "_seat")

    def __init__(self, ledger: SlotLedger, seat: _Seat) -> None:
        self._ledger = ledger
        self._seat = seat
        self._is_live = True

    @property
    def adapter(self) -> AdapterId:
        return self._seat.adapter

    @property
    def slot(self) -> int:
        return self._seat.slot

    def release(self) -> None:
        """Give the right back, exactly once."""
        assert self._is_live, f"the lease on adapter {self.adapter} was released before"
        self._is_live = False
        self._ledger._return(self._seat)


class SlotLedger:
    """Slots 1..num_slots under a budget of bytes.

    `policy` is this ledger's own (least recently used unless given); `on_lookup` is told of every lease of an adapter.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        max_bytes: int,
        policy: EvictionPolicy | None = None,
        on_lookup: OnLookup = unobserved,
    ) -> None:
        self._num_slots = num_slots
        self._max_bytes = max_bytes
        self._policy = policy or LeastRecentlyUsed()
        self._on_lookup = on_lookup
        self._base = _Seat(BASE, BASE_SLOT, 0)
        self._seats: dict[AdapterId, _Seat] = {}  # least recently used first
        self._free = list(range(num_slots, 0, -1))
        self._pinned: set[AdapterId] = set()
        self._num_bytes = 0
        self._told: tuple[Resident, ...] | None = None  # what `resident` gave, until something of it changes

    @property
    def num_slots(self) -> int:
        """Slots for adapters, the base's not counted."""
        return self._num_slots

    @property
    def num_bytes(self) -> int:
        """Bytes of the adapters that have a slot."""
        return self._num_bytes

    @property
    def num_leases(self) -> int:
        return self._base.leases + sum(seat.leases for seat in self._seats.values())

    def slot_of(self, adapter: AdapterId) -> int | None:
        """The adapter's slot, None when it has none."""
        seat = self._find(adapter)
        return None if seat is None else seat.slot

    def place(self, adapter: AdapterId, footprint: Footprint) -> Placement | None:
        """Give the adapter a slot, evicting idle ones; None (and nothing changed) while leases leave no room.

        Raises `AdapterUnavailable` when waiting cannot help: too large, or pins are in the way.
        """
        assert self._find(adapter) is None, f"adapter {adapter} has a slot already"
        self._require_possible(footprint.num_bytes)
        victims = self._victims_for(footprint.num_bytes)
        if victims is None:
            return None
        for seat in victims:
            self._remove(seat, is_evicted=True)
        seat = _Seat(adapter, self._free.pop(), footprint.num_bytes)
        self._seats[adapter] = seat
        self._policy.enter(adapter, seat.num_bytes)
        self._num_bytes += seat.num_bytes
        self._told = None
        return Placement(slot=seat.slot, evicted=tuple((v.slot, v.adapter) for v in victims))

    def acquire(self, adapter: AdapterId) -> Lease:
        """A lease on a resident adapter (or on the base)."""
        seat = self._find(adapter)
        assert seat is not None, f"adapter {adapter} has no slot to lease"
        seat.leases += 1
        if seat is not self._base:
            self._touch(seat, is_new_use=not seat.is_fresh)
            hit = not seat.is_fresh
            self._on_lookup(Lookup(tier="device", adapter=adapter, is_hit=hit, num_bytes=seat.num_bytes))
            seat.is_fresh = False
        return Lease(self, seat)

    def pin(self, adapter: AdapterId) -> None:
        """Never evict the adapter, from now on and whenever it has a slot."""
        self._pinned.add(adapter)
        self._told = None

    def unpin(self, adapter: AdapterId) -> None:
        self._pinned.discard(adapter)
        self._told = None

    @property
    def pinned(self) -> frozenset[AdapterId]:
        """Every adapter that is pinned, on the device or not."""
        return frozenset(self._pinned)

    def is_pinned(self, adapter: AdapterId) -> bool:
        return adapter in self._pinned

    def evict(self, adapter: AdapterId, *, to_make_room: bool = False) -> int | None:
        """Empty the adapter's slot and return it; None while it is leased or pinned, or if it has none.

        `to_make_room`: others need what it holds; else somebody wants it gone.
        """
        seat = self._seats.get(adapter)
        if seat is None or not self._is_idle(seat):
            return None
        self._remove(seat, is_evicted=to_make_room)
        return seat.slot

    def drop(self, adapter: AdapterId) -> int:
        """Empty the slot of an adapter that is not on the device after all, pinned or not."""
        seat = self._seats[adapter]
        assert seat.leases == 0, f"adapter {adapter} is dropped with {seat.leases} live leases"
        self._remove(seat, is_evicted=False)
        return seat.slot

    def idle(self) -> Iterable[AdapterId]:
        """Adapters that could be evicted now, in the policy's order."""
        return [adapter for adapter in self._policy.victims() if self._is_idle(self._seats[adapter])]

    def resident(self) -> tuple[Resident, ...]:
        """Every adapter that has a slot, the base not counted, least recently used first."""
        if self._told is None:
            self._told = self._residents()
        return self._told

    def _residents(self) -> tuple[Resident, ...]:
        return tuple(
            Resident(
                adapter=seat.adapter,
                slot=seat.slot,
                num_bytes=seat.num_bytes,
                num_leases=seat.leases,
                is_pinned=seat.adapter in self._pinned,
            )
            for seat in self._seats.values()
        )

    def check(self) -> None:
        """Assert that the books are consistent."""
        taken = [seat.slot for seat in self._seats.values()]
        assert sorted(taken + self._free) == list(range(1, self._num_slots + 1)), "a slot is lost or double"
        assert self._num_bytes == sum(seat.num_bytes for seat in self._seats.values()), "bytes do not add up"
        assert self._num_bytes <= self._max_bytes, "the adapters exceed the device's budget"
        assert all(seat.leases >= 0 for seat in self._seats.values()), "a slot has negative leases"
        assert self._base.leases >= 0, "the base has negative leases"
        assert BASE not in self._seats, "the base has a second slot"
        assert self._told in (None, self._residents()), "what was told of the residents is out of date"
        assert sorted(self._policy.victims()) == sorted(self._seats), "the policy knows other adapters"

    def _find(self, adapter: AdapterId) -> _Seat | None:
        return self._base if adapter == BASE else self._seats.get(adapter)

    def _is_idle(self, seat: _Seat) -> bool:
        return seat.leases == 0 and seat.adapter not in self._pinned

    def _touch(self, seat: _Seat, *, is_new_use: bool) -> None:
        self._told = None
        self._seats[seat.adapter] = self._seats.pop(seat.adapter)
        (self._policy.use if is_new_use else self._policy.rest)(seat.adapter)

    def _return(self, seat: _Seat) -> None:
        assert seat.leases > 0, f"adapter {seat.adapter} has no lease to return"
        seat.leases -= 1
        if seat is not self._base:
            self._touch(seat, is_new_use=False)

    def _remove(self, seat: _Seat, *, is_evicted: bool) -> None:
        del self._seats[seat.adapter]
        self._free.append(seat.slot)
        self._num_bytes -= seat.num_bytes
        self._told = None
        self._policy.leave(seat.adapter, is_evicted=is_evicted)

    def _require_possible(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes or self._num_slots == 0:
            raise AdapterUnavailable(
                f"the adapter needs {num_bytes} bytes on the device; this server was started with "
                f"{self._num_slots} slots and {self._max_bytes} bytes (device_adapter_bytes)"
            )
        pinned = [seat for seat in self._seats.values() if seat.adapter in self._pinned]
        pinned_bytes = sum(seat.num_bytes for seat in pinned)
        if len(pinned) >= self._num_slots or pinned_bytes + num_bytes > self._max_bytes:
            raise AdapterUnavailable(
                f"the adapter needs a slot and {num_bytes} bytes on the device; {len(pinned)} pinned "
                "adapters leave no room: unpin one, or start the server with more (device_adapter_bytes)",
                retry_after_s=_PINNED_RETRY_S,
            )

    def _victims_for(self, num_bytes: int) -> list[_Seat] | None:
        """The idle seats to empty, in the policy's order; None when all of them are not enough."""
        victims: list[_Seat] = []
        excess = self._num_bytes + num_bytes - self._max_bytes
        needs_slot = not self._free
        for adapter in self._policy.victims():
            if excess <= 0 and not needs_slot:
                break
            seat = self._seats[adapter]
            if self._is_idle(seat):
                victims.append(seat)
                excess -= seat.num_bytes
                needs_slot = False
        return None if excess > 0 or needs_slot else victims
