"""A tier of a replica's memory: adapters, their bytes, and the server's own eviction policy among those not in use."""

from collections.abc import Sequence

from peft_serve.adapters.eviction import EvictionPolicy
from peft_serve.core import AdapterId


class Tier:
    """So many bytes of adapters. `version` moves with its contents."""

    def __init__(
        self, max_bytes: float, policy: EvictionPolicy, sizes: Sequence[int], names: Sequence[AdapterId]
    ) -> None:
        self._free = max_bytes
        self._policy = policy
        self._sizes, self._names = sizes, names
        self._numbers: dict[AdapterId, int] = {}
        self._uses: dict[int, int] = {}  # by adapter that requests hold
        self.inside: dict[int, None] = {}
        self.version = 0

    def names(self) -> frozenset[AdapterId]:
        """Who is inside, as replicas tell it."""
        return frozenset(self._numbers)

    def ask(self, adapter: int) -> bool:
        """Whether it is inside; it was asked for, then."""
        if adapter not in self.inside:
            return False
        self._policy.use(self._names[adapter])
        return True

    def take(self, adapter: int) -> bool:
        """Put it inside, others making room; False, and nothing has changed, where those in use leave too little."""
        size, name = self._sizes[adapter], self._names[adapter]
        if adapter in self.inside:
            return True
        leaving, room = [], self._free
        if room < size:
            for victim in self._policy.victims():
                number = self._numbers[victim]
                if number not in self._uses:
                    leaving.append(number)
                    room += self._sizes[number]
                    if room >= size:
                        break
        if room < size:
            return False
        for number in leaving:
            self._policy.leave(self._names[number], is_evicted=True)
            del self.inside[number], self._numbers[self._names[number]]
        self._policy.enter(name, size)
        self.inside[adapter] = None
        self._numbers[name] = adapter
        self._free = room - size
        self.version += 1
        return True

    def hold(self, adapter: int) -> None:
        """A request uses it: it stays."""
        self._uses[adapter] = self._uses.get(adapter, 0) + 1

    def release(self, adapter: int) -> None:
        """One request uses it no more."""
        left = self._uses[adapter] - 1
        if left:
            self._uses[adapter] = left
        else:
            del self._uses[adapter]
