"""Where a call is to go, as one line of text: what Serve carries for us from a handle to its router.

Imported by every process that routes: it needs next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from peft_serve.core import BASE, AdapterId

_KEY_BYTES: Final = 8


def key_of(adapter: AdapterId) -> AdapterId:
    """The short name by which an adapter is routed: replicas tell of thousands, and each id is long."""
    return adapter if adapter == BASE else AdapterId(blake2b(adapter.encode(), digest_size=_KEY_BYTES).hexdigest())


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a call is to go, as text of one line: what Serve calls the model's id."""

    adapter: AdapterId = BASE  # its key
    only: str = ""  # this replica and no other
    avoided: str = ""  # another one than this, if there is one

    def text(self) -> str:
        return f"{self.adapter}|{self.only}|{self.avoided}"

    @classmethod
    def parse(cls, text: str) -> Route:
        """A route from its text; what is none goes to any replica, as a request for the base."""
        adapter, _, rest = text.partition("|")
        only, _, avoided = rest.partition("|")
        return cls(adapter=AdapterId(adapter or BASE), only=only, avoided=avoided)
