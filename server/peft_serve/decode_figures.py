"""How decode steps ran, in Prometheus' words: whether CUDA graphs serve what is asked of a server."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter

OUTCOMES: Final = ("replayed", "captured", "eager")


class DecodeFigures:
    """Counts decode steps of a base with CUDA graphs. Safe from any thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._steps = Counter(
            "peft_serve_decode_steps", "Decode steps by how they ran, with CUDA graphs.", ["how"], registry=registry
        )
        for how in OUTCOMES:  # a series that appears with its first event has no rate when that matters
            self._steps.labels(how)

    def observe(self, how: str) -> None:
        """A step in which each row has a token: one of `OUTCOMES`."""
        self._steps.labels(how).inc()
