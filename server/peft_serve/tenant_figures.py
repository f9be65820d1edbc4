"""What is counted of tenants and keys, in Prometheus' words. Tenants' names come from the operator, so they are few.

Owns its metrics in a registry that it is given. Knows no key and no request.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge

REFUSALS: Final = ("missing", "unknown", "scope")
"""Why the door was not opened: no key, one that nobody has, one that is for something else."""


class TenantFigures:
    """Safe from any thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "peft_serve_tenant_requests", "Requests by tenant.", ["tenant", "outcome"], registry=registry
        )
        self._tokens = Counter("peft_serve_tenant_tokens", "Tokens by tenant.", ["tenant", "kind"], registry=registry)
        self._quotas = Counter(
            "peft_serve_quota_refusals", "Requests refused by a quota.", ["tenant", "quota"], registry=registry
        )
        self._refusals = Counter(
            "peft_serve_access_refusals", "Requests refused for their key.", ["reason"], registry=registry
        )
        self._file_ok = Gauge(
            "peft_serve_api_keys_file_ok", "0 while the file of keys is broken and those of before go on.",
            registry=registry,
        )  # fmt: skip
        self._file_ok.set(1)
        for reason in REFUSALS:
            self._refusals.labels(reason)

    def observe_request(self, tenant: str, outcome: str, *, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """One of a tenant's requests has ended; those of a server without keys are nobody's."""
        if tenant:
            self._requests.labels(tenant, outcome).inc()
            self._tokens.labels(tenant, "prompt").inc(num_prompt_tokens)
            self._tokens.labels(tenant, "output").inc(num_output_tokens)

    def observe_quota(self, tenant: str, quota: str) -> None:
        self._quotas.labels(tenant, quota).inc()

    def observe_refusal(self, reason: str) -> None:
        """One of `REFUSALS`."""
        self._refusals.labels(reason).inc()

    def set_file_ok(self, ok: bool) -> None:
        self._file_ok.set(1 if ok else 0)
