"""Host copies: compiled adapters on their way from the host cache to a slot, and out of memory again.

Owns the leases on copies that wait for their install; on a CPU, where a slot refers to the very tensors of the copy,
until it has no slot: the host's bytes are then all there are, and those on the device are among them. Used on the
engine's thread alone; what the host cache does on its own thread comes back as a command.
"""

from __future__ import annotations

from collections.abc import Callable

from peft_serve.adapters.host_cache import HostCache
from peft_serve.adapters.primitives import Adapter
from peft_serve.core import AdapterId, Event, Footprint
from peft_serve.errors import AdapterUnavailable, InvalidParameter, ServeError
from peft_serve.scheduling.scheduler import Scheduler


class HostCopies:
    """See the module. `on_loaded` is called with what a load gave, on the host cache's thread or within `fetch`."""

    def __init__(
        self,
        host_cache: HostCache,
        scheduler: Scheduler,
        footprint_of: Callable[[Adapter], Footprint],
        on_loaded: Callable[[AdapterId, Adapter | Exception], None],
    ) -> None:
        self._host_cache = host_cache
        self._scheduler = scheduler
        self._footprint_of = footprint_of
        self._on_loaded = on_loaded
        self._ready: dict[AdapterId, Adapter] = {}
        self._unwanted: set[AdapterId] = set()

    def __getitem__(self, adapter: AdapterId) -> Adapter:
        """The copy to install."""
        return self._ready[adapter]

    def fetch(self) -> bool:
        """Ask for the adapters the scheduler wants next; False: for none. One that is at hand is told at once."""
        wanted = self._scheduler.take_loads()
        for adapter in wanted:
            self._host_cache.request(adapter, self._on_loaded)
        return bool(wanted)

    def warm(self, adapter: AdapterId) -> None:
        """Bring an adapter to the host for nobody in particular."""
        self._host_cache.request(adapter, self._let_go)

    def _let_go(self, adapter: AdapterId, outcome: Adapter | Exception) -> None:
        if not isinstance(outcome, Exception):
            self._host_cache.release(adapter)

    def receive(self, adapter: AdapterId, outcome: Adapter | Exception) -> list[Event]:
        """A load has ended; those who waited run, or fail."""
        if isinstance(outcome, Exception):  # which the host cache has logged, once for each load
            # A combination that cannot be is the caller's to put right; broken files are not.
            is_told = isinstance(outcome, AdapterUnavailable | InvalidParameter)
            return self._scheduler.adapter_failed(adapter, outcome if is_told else _unloadable(outcome))
        if adapter in self._ready:  # its waiters went and others came before the first copy was given back
            self._host_cache.release(adapter)
        self._ready[adapter] = outcome
        self._scheduler.adapter_ready(adapter, self._footprint_of(outcome))
        self.release_unclaimed()
        return []

    def release_unclaimed(self) -> None:
        """Give the copies back that their slots can do without by now, or that nobody waits for any more."""
        if not self._ready:
            return
        claims = self._scheduler.claims
        for adapter in [a for a in self._ready if a not in claims]:
            del self._ready[adapter]
            self._host_cache.release(adapter)

    def unload(self, adapter: AdapterId) -> None:
        """Give an adapter's memory back on every tier, at once or when nobody uses it any more."""
        self._unwanted.add(adapter)
        self.unload_idle()

    def unload_idle(self) -> None:
        """Do what `unload` was asked for and could not be done then."""
        for adapter in tuple(self._unwanted):
            is_resident = any(r.adapter == adapter for r in self._scheduler.snapshot().resident)
            if self._scheduler.evict(adapter) or not is_resident:
                self._unwanted.discard(adapter)
                self._host_cache.drop(adapter)
                self.release_unclaimed()


def _unloadable(cause: Exception) -> AdapterUnavailable:
    reason = cause.message if isinstance(cause, ServeError) else type(cause).__name__
    return AdapterUnavailable(f"the adapter does not load: {reason}; upload it again or ask the operator")
