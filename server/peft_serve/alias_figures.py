"""What is counted of aliases, in Prometheus' words: which version a request got, and how that went.

Owns its metrics in a registry that it is given. Knows no request and no catalog.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter

MAX_SERIES: Final = 200  # more targets than this share the labels `_other`
_OTHER: Final = ("_other", "_other", "")


class AliasFigures:
    """Safe from any thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ["alias", "adapter", "version"]
        self._requests = Counter(
            "peft_serve_alias_requests",
            "Requests by alias and by the version that answered.",
            [*labels, "outcome"],
            registry=registry,
        )
        self._seconds = Counter(
            "peft_serve_alias_request_seconds",
            "Seconds that these requests took, by alias and by the version that answered.",
            labels,
            registry=registry,
        )
        self._known: set[tuple[str, str, str]] = set()

    def observe_request(self, alias: str, adapter: str, version: int, outcome: str, *, seconds: float) -> None:
        """A request that named an alias has ended, on this version of this adapter."""
        where = (alias, adapter, str(version))
        if where not in self._known:
            if len(self._known) < MAX_SERIES:
                self._known.add(where)
            else:
                where = _OTHER
        self._requests.labels(*where, outcome).inc()
        self._seconds.labels(*where).inc(seconds)
