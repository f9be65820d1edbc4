"""Lookups: what the tiers of adapter memory report, each time somebody asks one for an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from peft_serve.core import AdapterId

Tier = Literal["device", "host", "disk"]


CACHE_HITS: Final = (
    "Found in the tier. device: a request starts to run; host: it asks for a copy; disk: an adapter is read, also "
    "ahead of the request, so these may be more than the misses of host."
)
CACHE_MISSES: Final = "Not in the tier. device and host: it has to be brought there; disk: it could not be read."
"""What the counters of lookups say of themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """One question to one tier, and how it was answered.

    Each tier counts its own, so hits and misses of a tier are its lookups; those of one tier are not the next one's
    hits, because adapters are also read ahead of requests (evicted before they are asked for, they are read again),
    and because several requests wait for one that is read.

    device  a request starts to run. A hit: the adapter was in a slot before
    host    a compiled adapter is asked for. A miss waits for a load, or meets a remembered failure
    disk    an adapter is read and compiled for the host. A miss: that failed
    """

    tier: Tier
    adapter: AdapterId
    is_hit: bool
    num_bytes: int | None = None  # of the compiled adapter; None where it is not known yet, or never will be
    load_s: float | None = None  # what reading and compiling it took; of the disk only


OnLookup = Callable[[Lookup], None]
"""Called where the lookup happens, on any thread; it must be quick and not raise."""


def unobserved(lookup: Lookup) -> None:
    """Nobody wants to know."""
