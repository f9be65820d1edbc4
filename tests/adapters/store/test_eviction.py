"""Eviction policies, the ranking under one of them, and the load costs it asks for."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_serve.adapters.eviction import CostAware, EvictionPolicy, LeastRecentlyUsed, Ranking, make_policy
from peft_serve.adapters.load_costs import LoadCosts
from peft_serve.core import AdapterId

A, B, C = (AdapterId(name) for name in "abc")
NAMES = [AdapterId(str(number)) for number in range(8)]
SIZES = {name: 1 + 3 * number for number, name in enumerate(NAMES)}
COSTS = {name: float(1 + number * 5 % 7) for number, name in enumerate(NAMES)}

acts = st.lists(st.tuples(st.sampled_from(["enter", "use", "rest", "evict", "leave"]), st.sampled_from(NAMES)))


def act(policy: EvictionPolicy, name: str, adapter: AdapterId, inside: set[AdapterId]) -> bool:
    """Do it if it is possible; whether it was."""
    if (name == "enter") == (adapter in inside):
        return False
    match name:
        case "enter":
            policy.enter(adapter, SIZES[adapter])
            inside.add(adapter)
        case "use":
            policy.use(adapter)
        case "rest":
            policy.rest(adapter)
        case _:
            policy.leave(adapter, is_evicted=name == "evict")
            inside.remove(adapter)
    return True


@given(acts)
def test_lru_is_the_exact_order_of_use(script: list[tuple[str, AdapterId]]) -> None:
    policy, inside, order = LeastRecentlyUsed(), set[AdapterId](), list[AdapterId]()
    for name, adapter in script:
        if not act(policy, name, adapter, inside):
            continue
        if adapter in order:
            order.remove(adapter)
        if adapter in inside:
            order.append(adapter)
        assert list(policy.victims()) == order


@given(acts)
def test_cost_is_the_formula_in_plain_arithmetic(script: list[tuple[str, AdapterId]]) -> None:
    policy, inside = CostAware(lambda adapter, _bytes: COSTS[adapter]), set[AdapterId]()
    level, uses, worth = 0.0, dict[AdapterId, int](), dict[AdapterId, tuple[float, int]]()
    for now, (name, adapter) in enumerate(script):
        if not act(policy, name, adapter, inside):
            continue
        if adapter not in inside:
            level = max(level, worth[adapter][0]) if name == "evict" else level
            del worth[adapter], uses[adapter]
        else:
            uses[adapter] = uses.get(adapter, 0) + (name != "rest")
            worth[adapter] = (level + uses[adapter] * COSTS[adapter] / SIZES[adapter], now)
        assert list(policy.victims()) == sorted(worth, key=worth.__getitem__)


def test_cost_keeps_what_is_hot_small_and_slow_to_load() -> None:
    policy = CostAware(lambda adapter, _bytes: 8.0 if adapter == A else 1.0)
    policy.enter(A, 10)
    policy.enter(B, 10)
    policy.enter(C, 40)
    assert list(policy.victims()) == [C, B, A]
    for _ in range(9):
        policy.use(B)
    assert list(policy.victims()) == [C, A, B]


def test_cost_forgets_what_was_popular_once() -> None:
    """Newcomers that are used once each push out, in the end, one that was used a hundred times and never again."""
    policy = CostAware(lambda _adapter, _bytes: 1.0)
    policy.enter(A, 1)
    for _ in range(99):
        policy.use(A)
    for number in range(1000):
        newcomer = AdapterId(f"new {number}")
        policy.enter(newcomer, 1)
        victim = next(policy.victims())
        policy.leave(victim, is_evicted=True)
        if victim == A:
            assert 90 <= number <= 110
            return
    pytest.fail("it is still there")


def test_one_that_was_told_to_leave_does_not_age_the_others() -> None:
    policy = CostAware(lambda _adapter, _bytes: 1.0)
    policy.enter(A, 1)
    for _ in range(99):
        policy.use(A)
    policy.enter(B, 1)
    policy.use(B)
    policy.leave(A, is_evicted=False)
    policy.enter(C, 1)
    assert list(policy.victims()) == [C, B]


def test_an_adapter_without_bytes_is_worth_something_finite() -> None:
    policy = CostAware(lambda _adapter, _bytes: 1.0)
    policy.enter(A, 0)
    policy.enter(B, 2)
    assert list(policy.victims()) == [B, A]


@pytest.mark.parametrize(("name", "made"), [("lru", LeastRecentlyUsed), ("cost", CostAware)])
def test_policies_are_made_by_name(name: str, made: type) -> None:
    assert isinstance(make_policy(name, lambda _adapter, num_bytes: num_bytes), made)  # type: ignore[arg-type]


def test_a_ranking_stays_small_and_in_order_however_often_it_changes() -> None:
    rng, ranking, numbers = random.Random(0), Ranking(), dict[AdapterId, float]()
    for _ in range(3000):
        adapter = rng.choice(NAMES)
        if adapter in numbers and rng.random() < 0.1:
            ranking.remove(adapter)
            del numbers[adapter]
        else:
            numbers[adapter] = rng.random()
            ranking.put(adapter, numbers[adapter])
        assert list(ranking) == sorted(numbers, key=numbers.__getitem__)
        assert len(ranking) == len(numbers)
        assert [ranking[adapter] for adapter in numbers] == list(numbers.values())
        assert len(ranking._heap) <= 2 * len(numbers) + Ranking._SLACK


def test_load_costs_are_as_measured_and_else_by_bytes() -> None:
    costs = LoadCosts()
    assert costs.seconds(A, 2000) == 2 * costs.seconds(A, 1000) > 0
    costs.measure(A, num_bytes=100, seconds=2.0)
    costs.measure(B, num_bytes=300, seconds=2.0)
    assert costs.seconds(A, 100) == 2.0
    assert costs.seconds(C, 50) == pytest.approx(50 * 4.0 / 400)
    costs.measure(A, num_bytes=100, seconds=4.0)
    assert costs.seconds(A, 100) == pytest.approx(3.0), "between the new figure and those before"


def test_load_costs_of_the_longest_ago_are_forgotten() -> None:
    costs = LoadCosts(max_adapters=2)
    for adapter, seconds in ((A, 1.0), (B, 2.0), (A, 1.0), (C, 3.0)):
        costs.measure(adapter, num_bytes=1, seconds=seconds)
    assert [costs.seconds(adapter, 1) for adapter in (A, C)] == [1.0, 3.0]
    assert costs.seconds(B, 1) == pytest.approx(7.0 / 4), "by its bytes"
