"""The host cache: compiled adapters in host memory, within a budget of bytes, loaded on its own threads.

One load serves everyone who asks meanwhile, and may begin before anybody does. A delivered adapter is *leased* to who
asked until `release`, so that one waiting to be installed on the device is never dropped under it; beyond the budget
those without a lease go, in the order of the eviction policy. A failure is remembered for a while, so that a broken
adapter does not keep the disk busy. How an adapter is loaded, and what the device holds, is not known here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final

from peft_serve.adapters.eviction import EvictionPolicy, LeastRecentlyUsed
from peft_serve.adapters.frames import without_frames
from peft_serve.adapters.load_failures import LoadFailures
from peft_serve.adapters.lookups import Lookup, OnLookup, unobserved
from peft_serve.adapters.primitives import Adapter
from peft_serve.adapters.shortage import is_short_of_memory
from peft_serve.core import AdapterId
from peft_serve.errors import AdapterDamaged, AdapterUnavailable, Unavailable

_LOG: Final = logging.getLogger(__name__)

OnDone = Callable[[AdapterId, Adapter | Exception], None]
"""Called once for each request, on the asking thread or on a loading one; it must be quick and not raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCacheStats:
    """Counts since the start, and what is here now."""

    hits: int
    misses: int  # requests that had to wait for a load, or met a remembered failure
    evictions: int
    num_bytes: int
    num_adapters: int
    num_loading: int


@dataclass(slots=True)
class _Entry:
    adapter: Adapter
    num_bytes: int
    leases: int
    keep: bool  # False: goes with its last lease, whatever room there is
    is_ahead: bool  # fetched ahead, and nobody has asked yet: whoever does would have had to wait


class HostCache:
    """Owner of compiled adapters on the host. Thread-safe.

    `clock` gives seconds that never go back. `max_ahead` bounds the loads under way beyond which none is begun ahead.
    `policy` is this cache's own (least recently used unless given).
    `on_lookup` is told of every request and every load, `on_evict` of every adapter that makes room for others.
    """

    def __init__(
        self,
        load: Callable[[AdapterId], Adapter],
        *,
        max_bytes: int,
        clock: Callable[[], float],
        failure_ttl_s: float = 10.0,
        max_ahead: int = 16,
        num_threads: int = 1,
        policy: EvictionPolicy | None = None,
        on_lookup: OnLookup = unobserved,
        on_evict: Callable[[], None] = lambda: None,
    ) -> None:
        self._load = load
        self._max_bytes = max_bytes
        self._clock = clock
        self._failures = LoadFailures(failure_ttl_s, clock)
        self._max_ahead = max_ahead
        self._policy = policy or LeastRecentlyUsed()  # knows the entries that are kept
        self._on_lookup = on_lookup
        self._on_evict = on_evict
        self._lock = threading.Lock()
        self._entries: dict[AdapterId, _Entry] = {}  # least recently used first
        self._num_bytes = 0  # of the entries that are kept
        self._held_bytes = 0  # of all entries
        self._waiters: dict[AdapterId, list[OnDone]] = {}  # ids being loaded
        self._dropped: set[AdapterId] = set()  # of those, the ones that are not to be kept
        self._hits = self._misses = self._evictions = 0
        self._closed = False
        self._queue: SimpleQueue[AdapterId | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"host-cache-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def request(self, adapter_id: AdapterId, on_done: OnDone) -> None:
        """Have `on_done` called with the adapter, leased, or with why it cannot be had."""
        with self._lock:
            is_closed, entry = self._closed, self._entries.get(adapter_id)
            is_hit = entry is not None and not entry.is_ahead
            outcome = self._at_hand(adapter_id)
            if outcome is None:
                self._begin(adapter_id)
                self._waiters[adapter_id].append(on_done)
        if not is_closed:
            num_bytes = None if entry is None else entry.num_bytes
            self._on_lookup(Lookup(tier="host", adapter=adapter_id, is_hit=is_hit, num_bytes=num_bytes))
        if outcome is not None:
            _deliver(on_done, adapter_id, outcome)

    def fetch_ahead(self, adapter_id: AdapterId) -> None:
        """Begin to load an adapter that somebody is about to request, unless enough is under way. Leases nothing."""
        with self._lock:
            is_known = adapter_id in self._entries or self._failures.get(adapter_id) is not None
            if not (self._closed or is_known) and len(self._waiters) < self._max_ahead:
                self._begin(adapter_id)

    def _begin(self, adapter_id: AdapterId) -> None:
        """Have it loaded, unless it is being loaded."""
        if adapter_id not in self._waiters:
            self._waiters[adapter_id] = []
            self._queue.put(adapter_id)

    def _at_hand(self, adapter_id: AdapterId) -> Adapter | Exception | None:
        """What can be answered at once: an adapter (leased by this), a remembered failure, or nothing."""
        if self._closed:
            return Unavailable("the server is stopping; ask again", retry_after_s=1.0)
        entry = self._entries.get(adapter_id)
        if entry is not None:
            self._hits += not entry.is_ahead
            self._misses += entry.is_ahead
            entry.is_ahead = False
            entry.leases += 1
            self._entries[adapter_id] = self._entries.pop(adapter_id)
            if entry.keep:
                self._policy.use(adapter_id)
            return entry.adapter
        self._misses += 1
        return self._failures.get(adapter_id)

    def release(self, adapter_id: AdapterId) -> None:
        """Give back the lease of one delivery."""
        with self._lock:
            entry = self._entries[adapter_id]
            assert entry.leases > 0, "a lease is given back exactly once"
            entry.leases -= 1
            self._let_go(adapter_id)
            num_evicted = self._evict()
        self._tell(num_evicted)

    def get(self, adapter_id: AdapterId) -> Adapter | None:
        """The adapter if it is here, without a lease: the caller has one, or is done before anything else."""
        with self._lock:
            entry = self._entries.get(adapter_id)
            return None if entry is None else entry.adapter

    def drop(self, adapter_id: AdapterId) -> None:
        """Forget an adapter and what is known of its failures; a leased one goes with its last lease."""
        with self._lock:
            self._failures.forget(adapter_id)
            if adapter_id in self._waiters:
                self._dropped.add(adapter_id)
            entry = self._entries.get(adapter_id)
            if entry is not None and entry.keep:
                self._disown(adapter_id, is_evicted=False)
                self._let_go(adapter_id)

    def resident(self) -> tuple[AdapterId, ...]:
        """The adapters that are here, least recently used first."""
        with self._lock:
            return tuple(self._entries)

    def stats(self) -> HostCacheStats:
        with self._lock:
            return HostCacheStats(
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                num_bytes=self._held_bytes,
                num_adapters=len(self._entries),
                num_loading=len(self._waiters),
            )

    def close(self) -> None:
        """Take no more requests, answer those that wait, and end the threads; a load that runs is awaited."""
        with self._lock:
            self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def check(self) -> None:
        """Our own books."""
        with self._lock:
            kept = [entry for entry in self._entries.values() if entry.keep]
            assert self._num_bytes == sum(entry.num_bytes for entry in kept), "bytes do not add up"
            assert all(entry.leases > 0 for entry in self._entries.values() if not entry.keep), "a leftover"
            held = sum(entry.num_bytes for entry in self._entries.values())
            assert self._held_bytes == held, "the bytes of what is here do not add up"
            over = self._num_bytes > self._max_bytes
            assert not over or all(entry.leases > 0 for entry in kept), "over budget with one to evict"
            assert self._dropped <= self._waiters.keys(), "dropped, yet nobody waits"
            known = sorted(self._policy.victims())
            assert known == sorted(i for i, e in self._entries.items() if e.keep), "the policy knows other adapters"

    def _work(self) -> None:
        while (adapter_id := self._queue.get()) is not None:
            outcome, num_bytes = self._loaded(adapter_id)
            with self._lock:
                waiters = self._waiters.pop(adapter_id)
                self._take_in(adapter_id, outcome, num_bytes, num_leases=len(waiters))
                self._dropped.discard(adapter_id)
                num_evicted = self._evict()
            self._tell(num_evicted)
            for on_done in waiters:
                _deliver(on_done, adapter_id, outcome)

    def _loaded(self, adapter_id: AdapterId) -> tuple[Adapter | Exception, int]:
        """The adapter and its bytes, or why it cannot be had and none."""
        with self._lock:
            if self._closed:
                return Unavailable("the server is stopping; ask again", retry_after_s=1.0), 0
        start_s = self._clock()
        num_bytes = None
        try:
            adapter = self._load_or_make_room(adapter_id)
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in adapter.tensors())
            return adapter, num_bytes
        except Exception as error:  # noqa: BLE001 (whatever a load raises fails its own requests only)
            _LOG.warning("adapter %s cannot be loaded: %s: %s", adapter_id, type(error).__name__, error)
            return _no_memory() if is_short_of_memory(error) else without_frames(error), 0
        finally:
            load_s, is_hit = self._clock() - start_s, num_bytes is not None
            self._on_lookup(Lookup(tier="disk", adapter=adapter_id, is_hit=is_hit, num_bytes=num_bytes, load_s=load_s))

    def _load_or_make_room(self, adapter_id: AdapterId) -> Adapter:
        """Load; where memory runs out, whatever the budget says, once more without those that nobody uses."""
        try:
            return self._load(adapter_id)
        except Exception as error:
            if not is_short_of_memory(error):
                raise
        with self._lock:
            victims = [i for i in self._policy.victims() if self._entries[i].leases == 0]
            self._let_out(victims)
        self._tell(len(victims))
        return self._load(adapter_id)

    def _take_in(self, adapter_id: AdapterId, outcome: Adapter | Exception, num_bytes: int, *, num_leases: int) -> None:
        dropped = adapter_id in self._dropped
        if isinstance(outcome, Exception):
            if not (dropped or isinstance(outcome, AdapterDamaged)):  # an upload mends that, and the store is quick
                self._failures.note(adapter_id, outcome)
            return
        keep = num_bytes <= self._max_bytes and not dropped
        if not (keep or num_leases):  # fetched ahead, and not to be kept for those who may come
            return
        is_ahead = num_leases == 0
        assert adapter_id not in self._entries, "what is here is not loaded once more"
        self._entries[adapter_id] = _Entry(outcome, num_bytes, leases=num_leases, keep=keep, is_ahead=is_ahead)
        self._held_bytes += num_bytes
        if keep:
            self._num_bytes += num_bytes
            self._policy.enter(adapter_id, num_bytes)
            for _ in range(num_leases - 1):
                self._policy.use(adapter_id)

    def _evict(self) -> int:
        """Let go of adapters without a lease, in the policy's order, until the rest is within the budget; how many."""
        excess = self._num_bytes - self._max_bytes
        victims = _victims(excess, self._policy.victims(), self._entries) if excess > 0 else []
        self._let_out(victims)
        return len(victims)

    def _let_out(self, victims: Sequence[AdapterId]) -> None:
        for adapter_id in victims:
            self._disown(adapter_id, is_evicted=True)
            self._let_go(adapter_id)
        self._evictions += len(victims)

    def _disown(self, adapter_id: AdapterId, *, is_evicted: bool) -> None:
        """The entry does not count any more, and goes with its last lease."""
        entry = self._entries[adapter_id]
        entry.keep = False
        self._num_bytes -= entry.num_bytes
        self._policy.leave(adapter_id, is_evicted=is_evicted)

    def _let_go(self, adapter_id: AdapterId) -> None:
        entry = self._entries[adapter_id]
        if not entry.keep and entry.leases == 0:
            del self._entries[adapter_id]
            self._held_bytes -= entry.num_bytes

    def _tell(self, num_evicted: int) -> None:
        for _ in range(num_evicted):
            self._on_evict()


def _victims(num_bytes: int, order: Iterable[AdapterId], entries: Mapping[AdapterId, _Entry]) -> list[AdapterId]:
    """Those without a lease, in that order, until so many bytes are given."""
    found: list[AdapterId] = []
    for adapter_id in order:
        if num_bytes <= 0:
            break
        entry = entries[adapter_id]
        if entry.leases == 0:
            found.append(adapter_id)
            num_bytes -= entry.num_bytes
    return found


def _deliver(on_done: OnDone, adapter_id: AdapterId, outcome: Adapter | Exception) -> None:
    try:
        on_done(adapter_id, outcome)
    except Exception:  # noqa: BLE001 (the other receivers must still hear, and the thread go on)
        _LOG.exception("the receiver of adapter %s failed", adapter_id)


def _no_memory() -> AdapterUnavailable:
    return AdapterUnavailable("memory ran out while the adapter was loaded; try again later", retry_after_s=1.0)
