"""What the front counts of placing: how often a request for an adapter goes where the one before it went."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge

from peft_serve.core import BASE, AdapterId

MAX_REMEMBERED: Final = 65_536


class PlacingFigures:
    """Owner of two series and of where each adapter was last. Used on the event loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._placed = Counter(
            "peft_serve_placed_requests",
            "Requests that a replica took: for the base, for an adapter first asked for, on the replica that had the "
            "adapter's last one, on another one, or once more as the first replica was lost.",
            ["kind"],
            registry=registry,
        )
        for kind in ("base", "first", "same", "moved", "again"):
            self._placed.labels(kind)
        self._replicas = Gauge("peft_serve_replicas", "Replicas of the engine that take requests.", registry=registry)
        self._last: dict[AdapterId, str] = {}

    def observe(self, adapter: AdapterId, replica: str, *, is_again: bool) -> None:
        """A replica took a request."""
        last = self._last.pop(adapter, None)
        if adapter != BASE:
            self._last[adapter] = replica
            if len(self._last) > MAX_REMEMBERED:
                del self._last[next(iter(self._last))]
        self._placed.labels(_kind(adapter, replica, last, is_again)).inc()

    def set_replicas(self, number: int) -> None:
        self._replicas.set(number)


def _kind(adapter: AdapterId, replica: str, last: str | None, is_again: bool) -> str:
    if is_again:
        return "again"
    if adapter == BASE:
        return "base"
    if last is None:
        return "first"
    return "same" if last == replica else "moved"
