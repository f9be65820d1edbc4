"""What is known of a replica when a request is to be placed: a fact as it was told, and so perhaps a little old.

Knows no network and no clock; who tells it, how often and by what way is the router's.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft_serve.core import AdapterId


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """One replica as it was last heard of."""

    name: str  # stable while the replica lives
    num_ongoing: int  # requests it has now
    max_ongoing: int  # at which it takes no more
    resident: frozenset[AdapterId] = frozenset()  # on its device
    on_host: frozenset[AdapterId] = frozenset()  # in its host memory
    wait_s: float = 0.0  # until a new request's first token, as its engine reckons
    max_running: int | None = None  # of its requests, those that run at once while others wait; None: all of them

    @property
    def is_full(self) -> bool:
        """Whether it takes no more."""
        return self.num_ongoing >= self.max_ongoing

    @property
    def load(self) -> float:
        """Its requests over those that it runs at once: above 1, some of them wait."""
        return self.num_ongoing / (self.max_running or self.max_ongoing)
