"""Buckets of requests and tokens, on a clock of the test's."""

from __future__ import annotations

import pytest

from peft_serve.api.principal import Quota, Tenant
from peft_serve.api.quotas import Quotas
from peft_serve.errors import QuotaExceeded


class Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def tenant(name: str = "a", **quota: float) -> Tenant:
    return Tenant(name=name, quota=Quota(**quota))  # type: ignore[arg-type]


def num_taken(quotas: Quotas, whose: Tenant, tries: int = 100) -> int:
    for i in range(tries):
        try:
            quotas.take_request(whose)
        except QuotaExceeded:
            return i
    return tries


def test_a_burst_then_the_rate() -> None:
    clock = Clock()
    quotas, one = Quotas(clock), tenant(requests_per_s=4, burst=10)
    assert num_taken(quotas, one) == 10
    clock.now_s += 0.5
    assert num_taken(quotas, one) == 2
    clock.now_s += 1e6
    assert num_taken(quotas, one) == 10, "no more than a burst is saved up"


def test_a_slow_rate_lets_one_in_at_a_time() -> None:
    clock = Clock()
    quotas, one = Quotas(clock), tenant(requests_per_s=0.1)
    assert num_taken(quotas, one) == 1
    with pytest.raises(QuotaExceeded, match="try again in 10 s") as caught:
        quotas.take_request(one)
    assert (caught.value.quota, caught.value.retry_after_s) == ("requests_per_s", 10)
    clock.now_s += 9.99
    assert num_taken(quotas, one) == 0
    clock.now_s += 0.02
    assert num_taken(quotas, one) == 1


def test_tenants_have_buckets_of_their_own_and_keys_of_one_share_it() -> None:
    quotas = Quotas(Clock())
    assert num_taken(quotas, tenant("a", requests_per_s=3)) == 3
    assert num_taken(quotas, tenant("a", requests_per_s=3)) == 0
    assert num_taken(quotas, tenant("b", requests_per_s=3)) == 3
    assert num_taken(quotas, tenant("c")) == 100


def test_a_new_figure_counts_at_once() -> None:
    clock = Clock()
    quotas = Quotas(clock)
    assert num_taken(quotas, tenant(requests_per_s=50)) == 50
    clock.now_s += 1
    assert num_taken(quotas, tenant(requests_per_s=2)) == 2


def test_tokens_are_owed_and_come_back() -> None:
    clock = Clock()
    quotas, one = Quotas(clock), tenant(tokens_per_min=120)
    quotas.require_tokens(one)
    quotas.charge_tokens(one, 400)
    with pytest.raises(QuotaExceeded) as caught:
        quotas.require_tokens(one)
    assert caught.value.retry_after_s == pytest.approx((400 - 120 + 1) / 2)
    clock.now_s += caught.value.retry_after_s
    quotas.require_tokens(one)
    quotas.charge_tokens(tenant(), 10**9)
    quotas.require_tokens(tenant())
