"""Quotas over time: buckets of requests and of tokens, one of each for a tenant that has the quota.

A request takes one from its tenant's bucket as it comes. Tokens are charged when an answer has ended, as many as its
prompt and it had; the bucket may go below empty then, and lets nobody in until it has refilled. The figures of a quota
are read each time, so that a change of them acts at once. Belongs to the event loop's thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from peft_serve.api.principal import Tenant
from peft_serve.errors import QuotaExceeded

REQUESTS: Final = "requests_per_s"
TOKENS: Final = "tokens_per_min"


@dataclass(slots=True)
class _Bucket:
    level: float
    at_s: float


class Quotas:
    """`clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def take_request(self, tenant: Tenant) -> None:
        """Count a request; raises QuotaExceeded."""
        rate = tenant.quota.requests_per_s
        if rate is None:
            return
        burst = tenant.quota.burst or max(1, math.ceil(rate))
        bucket = self._filled(tenant, REQUESTS, rate, burst)
        if bucket.level < 1:
            raise QuotaExceeded(
                f"{REQUESTS}: tenant '{tenant.name}' sends more than {rate:g} requests a second",
                quota=REQUESTS,
                retry_after_s=(1 - bucket.level) / rate,
            )
        bucket.level -= 1

    def require_tokens(self, tenant: Tenant) -> None:
        """Raise QuotaExceeded while the tenant has used more tokens than have refilled."""
        limit = tenant.quota.tokens_per_min
        if limit is None:
            return
        bucket = self._filled(tenant, TOKENS, limit / 60, limit)
        if bucket.level < 1:
            raise QuotaExceeded(
                f"{TOKENS}: tenant '{tenant.name}' has used its {limit} tokens a minute",
                quota=TOKENS,
                retry_after_s=(1 - bucket.level) * 60 / limit,
            )

    def charge_tokens(self, tenant: Tenant, count: int) -> None:
        """An answer has ended that took so many."""
        limit = tenant.quota.tokens_per_min
        if limit is not None:
            self._filled(tenant, TOKENS, limit / 60, limit).level -= count

    def _filled(self, tenant: Tenant, kind: str, rate: float, most: float) -> _Bucket:
        """The bucket as it stands now."""
        now_s = self._clock()
        bucket = self._buckets.setdefault((tenant.name, kind), _Bucket(most, now_s))
        bucket.level = min(most, bucket.level + (now_s - bucket.at_s) * rate)
        bucket.at_s = now_s
        return bucket
