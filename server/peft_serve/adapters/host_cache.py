"""The host cache: compiled adapters in host memory, within a budget of bytes, loaded on its own threads.

One load serves everyone who asks meanwhile. A delivered adapter is *leased* to who asked until `release`, so
that one waiting to be installed on the device is never dropped under it; beyond the budget the least recently
used one without a lease goes. A failure is remembered for a while, so that a broken adapter does not keep the
disk busy. How an adapter is loaded, and what the device holds, is not known here.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final

from peft_serve.adapters.primitives import Adapter
from peft_serve.core import AdapterId
from peft_serve.errors import Unavailable

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


class HostCache:
    """Owner of compiled adapters on the host. Thread-safe.

    `clock` gives seconds that never go back; `observe_load` is told each load's id and seconds.
    """

    def __init__(
        self,
        load: Callable[[AdapterId], Adapter],
        *,
        max_bytes: int,
        clock: Callable[[], float],
        failure_ttl_s: float = 10.0,
        num_threads: int = 1,
        observe_load: Callable[[AdapterId, float], None] = lambda _adapter, _seconds: None,
    ) -> None:
        self._load = load
        self._max_bytes = max_bytes
        self._clock = clock
        self._failure_ttl_s = failure_ttl_s
        self._observe_load = observe_load
        self._lock = threading.Lock()
        self._entries: OrderedDict[AdapterId, _Entry] = OrderedDict()  # least recently used first
        self._num_bytes = 0
        self._waiters: dict[AdapterId, list[OnDone]] = {}  # ids being loaded
        self._dropped: set[AdapterId] = set()  # of those, the ones that are not to be kept
        self._failures: dict[AdapterId, tuple[float, Exception]] = {}  # until when, and why
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
            outcome = self._at_hand(adapter_id)
            if outcome is None:
                if adapter_id not in self._waiters:
                    self._waiters[adapter_id] = []
                    self._queue.put(adapter_id)
                self._waiters[adapter_id].append(on_done)
        if outcome is not None:
            _deliver(on_done, adapter_id, outcome)

    def _at_hand(self, adapter_id: AdapterId) -> Adapter | Exception | None:
        """What can be answered at once: an adapter (leased by this), a remembered failure, or nothing."""
        if self._closed:
            return Unavailable("the server is stopping; ask again", retry_after_s=1.0)
        entry = self._entries.get(adapter_id)
        if entry is not None:
            self._hits += 1
            entry.leases += 1
            self._entries.move_to_end(adapter_id)
            return entry.adapter
        self._misses += 1
        until, failure = self._failures.get(adapter_id, (0.0, None))
        return failure if failure is not None and self._clock() < until else None

    def release(self, adapter_id: AdapterId) -> None:
        """Give back the lease of one delivery."""
        with self._lock:
            entry = self._entries[adapter_id]
            assert entry.leases > 0, "a lease is given back exactly once"
            entry.leases -= 1
            self._evict()

    def get(self, adapter_id: AdapterId) -> Adapter | None:
        """The adapter if it is here, without a lease: the caller has one, or is done before anything else."""
        with self._lock:
            entry = self._entries.get(adapter_id)
            return None if entry is None else entry.adapter

    def drop(self, adapter_id: AdapterId) -> None:
        """Forget an adapter and what is known of its failures; a leased one goes with its last lease."""
        with self._lock:
            self._failures.pop(adapter_id, None)
            if adapter_id in self._waiters:
                self._dropped.add(adapter_id)
            entry = self._entries.get(adapter_id)
            if entry is not None and entry.keep:
                entry.keep = False
                self._num_bytes -= entry.num_bytes
                self._evict()

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
                num_bytes=sum(entry.num_bytes for entry in self._entries.values()),
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
            over = self._num_bytes > self._max_bytes
            assert not over or all(entry.leases > 0 for entry in kept), "over budget with one to evict"
            assert self._dropped <= self._waiters.keys(), "dropped, yet nobody waits"

    def _work(self) -> None:
        while (adapter_id := self._queue.get()) is not None:
            outcome = self._loaded(adapter_id)
            with self._lock:
                waiters = self._waiters.pop(adapter_id)
                self._take_in(adapter_id, outcome, num_leases=len(waiters))
                self._dropped.discard(adapter_id)
            for on_done in waiters:
                _deliver(on_done, adapter_id, outcome)

    def _loaded(self, adapter_id: AdapterId) -> Adapter | Exception:
        with self._lock:
            if self._closed:
                return Unavailable("the server is stopping; ask again", retry_after_s=1.0)
        start = self._clock()
        try:
            return self._load(adapter_id)
        except Exception as error:  # noqa: BLE001 (whatever a load raises fails its own requests only)
            _LOG.warning("adapter %s cannot be loaded: %s: %s", adapter_id, type(error).__name__, error)
            return _without_frames(error)
        finally:
            self._observe_load(adapter_id, self._clock() - start)

    def _take_in(self, adapter_id: AdapterId, outcome: Adapter | Exception, *, num_leases: int) -> None:
        now = self._clock()
        self._failures = {key: kept for key, kept in self._failures.items() if now < kept[0]}
        dropped = adapter_id in self._dropped
        if isinstance(outcome, Exception):
            if not dropped:
                self._failures[adapter_id] = (now + self._failure_ttl_s, outcome)
            return
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in outcome.tensors())
        keep = num_bytes <= self._max_bytes and not dropped
        self._entries[adapter_id] = _Entry(adapter=outcome, num_bytes=num_bytes, leases=num_leases, keep=keep)
        self._num_bytes += num_bytes if keep else 0
        self._evict()

    def _evict(self) -> None:
        """Let go of what has no lease: what is not to be kept, then the least recently used until there is room."""
        for adapter_id, entry in tuple(self._entries.items()):
            if entry.leases or (entry.keep and self._num_bytes <= self._max_bytes):
                continue
            del self._entries[adapter_id]
            if entry.keep:
                self._num_bytes -= entry.num_bytes
                self._evictions += 1


def _deliver(on_done: OnDone, adapter_id: AdapterId, outcome: Adapter | Exception) -> None:
    try:
        on_done(adapter_id, outcome)
    except Exception:  # noqa: BLE001 (the other receivers must still hear, and the thread go on)
        _LOG.exception("the receiver of adapter %s failed", adapter_id)


def _without_frames(error: Exception) -> Exception:
    """The error without its tracebacks: their frames would keep the checkpoint's bytes alive with it."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
