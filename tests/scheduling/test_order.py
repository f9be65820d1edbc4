"""Fairness between adapters: a flood delays itself, and nobody saves up shares while away."""

from __future__ import annotations

import random

import pytest

from peft_serve.core import AdapterId, Footprint, SamplingParams
from peft_serve.scheduling.order import OUTPUT_WEIGHT, PROMPT_WEIGHT, ArrivalOrder, FairOrder
from tests.scheduling.world import World, adapter_id, some_limits

FLOOD, CALM, OTHER = adapter_id(0), adapter_id(3), adapter_id(5)
FOUR = SamplingParams(max_new_tokens=4, ignore_eos=True)


def a_world(order: FairOrder | ArrivalOrder, **changes: object) -> World:
    return World(some_limits(max_rows=2, affinity_age_s=1e9, **changes), order=order)


def order_of_first_steps(world: World) -> list[AdapterId]:
    seen: dict[str, None] = {}
    for step in world.steps:
        for row in sorted(step.rows, key=lambda row: int(row.request[1:])):
            seen.setdefault(row.request)
    return [world.requests[request].adapter for request in seen]  # type: ignore[index]


@pytest.mark.parametrize("order", [FairOrder(), ArrivalOrder()], ids=["fair", "arrival"])
def test_a_calm_adapter_does_not_wait_for_a_flood(order: FairOrder | ArrivalOrder) -> None:
    world = a_world(order)
    for _ in range(12):
        world.submit(FLOOD, (1, 2, 3), sampling=FOUR)
    world.load_all()
    for _ in range(3):
        world.step()
    world.submit(CALM, (1, 2, 3), sampling=FOUR)
    world.drain()
    place = order_of_first_steps(world).index(CALM)
    assert place <= 5 if isinstance(order, FairOrder) else place == 12
    world.check_answers()


def test_shares_are_even_while_all_wait() -> None:
    """Whatever they ask for: one with long answers gets fewer of them."""
    order = FairOrder()
    world = a_world(order)
    sizes = {FLOOD: (2, 8), CALM: (9, 2), OTHER: (4, 4)}
    for adapter, (num_prompt, num_new) in sizes.items():
        sampling = SamplingParams(max_new_tokens=num_new, ignore_eos=True)
        for i in range(60):
            world.submit(adapter, [i % 7] * num_prompt, sampling=sampling)
    world.load_all()
    while all(world.scheduler.snapshot().waiting_adapters.count(a) for a in sizes):
        world.step()
    given = [order.given(adapter) for adapter in sizes]
    largest = max(PROMPT_WEIGHT * p + OUTPUT_WEIGHT * n for p, n in sizes.values())
    assert max(given) - min(given) <= 2 * largest * world.limits.max_rows
    assert min(given) > 10 * largest, "they were served for long enough to tell"
    world.drain()
    world.check_answers()


def test_who_was_away_has_saved_nothing_up() -> None:
    order = FairOrder()
    world = a_world(order)
    for _ in range(20):
        world.submit(FLOOD, (1, 2, 3), sampling=FOUR)
    world.drain_requests()
    world.submit(FLOOD, (1, 2, 3), sampling=FOUR)
    world.submit(CALM, (1, 2, 3), sampling=FOUR)
    assert order.given(CALM) == order.given(FLOOD) > 0
    world.drain()


def test_an_adapter_that_comes_when_nobody_waits_has_saved_nothing_up() -> None:
    order = FairOrder()
    world = a_world(order)
    for _ in range(20):
        world.submit(FLOOD, (1, 2, 3), sampling=FOUR)
    world.load_all()
    world.drain_requests()
    num_done = len(order_of_first_steps(world))
    for adapter in (CALM, FLOOD):
        for _ in range(12):
            world.submit(adapter, (1, 2, 3), sampling=FOUR)
    world.load_all()
    world.drain()
    num_new = order_of_first_steps(world)[num_done:][:12].count(CALM)
    assert 5 <= num_new <= 8, "and not its twelve before all the others"


def test_counters_do_not_pile_up() -> None:
    order = FairOrder()
    world = World(some_limits(), footprints={adapter_id(i): Footprint(num_bytes=1) for i in range(5000)}, order=order)
    for i in range(5000):
        request = world.submit(adapter_id(i), (1,), sampling=FOUR)
        world.cancel(request)
    assert order.num_counters <= 4098 + 1, "of the adapters, and of the one tenant"


@pytest.mark.parametrize("seed", range(10))
def test_everyone_gets_what_they_would_get_alone(seed: int) -> None:
    draw = random.Random(seed)
    world = World(some_limits(), num_blocks=24, order=FairOrder())
    for _ in range(40):
        sampling = SamplingParams(max_new_tokens=draw.randint(1, 8), ignore_eos=True)
        adapter = adapter_id(draw.choice([0, 0, 0, 1, 2, 3]))
        request = world.submit(adapter, draw.choices(range(9), k=draw.randint(1, 12)), sampling=sampling)
        world.load_all()
        for _ in range(draw.randint(0, 2)):
            world.step(cancel=draw.choice([None, None, None, request]))
    world.drain()
    world.check_answers()
