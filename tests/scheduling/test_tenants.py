"""Tenants in the scheduler: each gets its share while it waits, and none finds what was computed for another."""

from __future__ import annotations

import random

import pytest

from peft_serve.core import BASE, AdapterId, Footprint, RequestId, SamplingParams
from peft_serve.scheduling.order import OUTPUT_WEIGHT, PROMPT_WEIGHT, FairOrder, order_of
from tests.scheduling.world import World, adapter_id, some_limits

ONE, TWO, THREE = adapter_id(0), adapter_id(3), adapter_id(5)
FOUR = SamplingParams(max_new_tokens=4, ignore_eos=True)
PROMPT = tuple(range(10, 24))
LARGEST = PROMPT_WEIGHT * 3 + OUTPUT_WEIGHT * 4


def a_world(order: FairOrder) -> World:
    return World(some_limits(max_rows=2, affinity_age_s=1e9), order=order)


def first_steps(world: World) -> list[RequestId]:
    """Requests in the order in which they began."""
    seen: dict[RequestId, None] = {}
    for step in world.steps:
        for row in sorted(step.rows, key=lambda row: int(row.request[1:])):
            seen.setdefault(row.request)
    return list(seen)


@pytest.mark.parametrize("between_adapters", [True, False])
def test_a_tenant_does_not_wait_for_anothers_flood(between_adapters: bool) -> None:
    """However many adapters the flood is for: they share what is their tenant's."""
    world = a_world(FairOrder(between_adapters=between_adapters))
    for i in range(24):
        world.submit((ONE, TWO, THREE, BASE)[i % 4], (1, 2, 3), sampling=FOUR, tenant="flood")
    world.load_all()
    for _ in range(3):
        world.step()
    calm = world.submit(ONE, (1, 2, 3), sampling=FOUR, tenant="calm")
    world.drain()
    assert first_steps(world).index(calm) <= 5
    world.check_answers()


def test_within_a_tenant_the_oldest_is_first_unless_adapters_share() -> None:
    """The second adapter's only request overtakes the first one's where adapters share, and nowhere else."""
    places = {}
    for between_adapters in (True, False):
        world = a_world(FairOrder(between_adapters=between_adapters))
        for _ in range(12):
            world.submit(ONE, (1, 2, 3), sampling=FOUR, tenant="a")
        world.load_all()
        for _ in range(3):
            world.step()
        late = world.submit(TWO, (1, 2, 3), sampling=FOUR, tenant="a")
        world.drain()
        places[between_adapters] = first_steps(world).index(late)
    assert places[True] <= 5
    assert places[False] == 12


@pytest.mark.parametrize("policy", ["fcfs", "affinity", "fair"])
def test_every_policy_is_fair_to_tenants(policy: str) -> None:
    world = World(some_limits(max_rows=2, affinity_age_s=1e9), order=order_of(policy, has_tenants=True))
    for _ in range(20):
        world.submit(ONE, (1, 2, 3), sampling=FOUR, tenant="flood")
    world.load_all()
    world.step()
    calm = world.submit(ONE, (1, 2, 3), sampling=FOUR, tenant="calm")
    world.drain()
    assert first_steps(world).index(calm) <= 5
    assert order_of(policy, has_tenants=False).is_by_arrival == (policy != "fair")


def test_shares_are_as_the_weights() -> None:
    order = FairOrder()
    world = a_world(order)
    weights = {"light": 1.0, "double": 2.0, "half": 0.5}
    for tenant, weight in weights.items():
        for i in range(60):
            world.submit((ONE, TWO)[i % 2], (1, 2, 3), sampling=FOUR, tenant=tenant, tenant_weight=weight)
    world.load_all()
    while all(any(t.request.tenant == tenant and t.is_waiting for t in waiting(world)) for tenant in weights):
        world.step()
    given = {tenant: order.given_to(tenant) for tenant in weights}
    assert min(given.values()) > 5 * LARGEST, "they were served for long enough to tell"
    assert max(given.values()) - min(given.values()) <= 2 * LARGEST * world.limits.max_rows / min(weights.values())
    got = {tenant: tokens_of(world, tenant) for tenant in weights}
    for more, less in (("double", "light"), ("light", "half")):
        assert 1.6 < got[more] / got[less] < 2.5, got
    world.drain()
    world.check_answers()


def tokens_of(world: World, tenant: str) -> int:
    """Tokens that the tenant's requests have been given."""
    return sum(len(world.tokens[id_]) for id_, request in world.requests.items() if request.tenant == tenant)


def waiting(world: World) -> list:  # type: ignore[type-arg]
    return list(world.scheduler._roster.queue)


def test_who_was_away_has_saved_nothing_up() -> None:
    order = FairOrder()
    world = a_world(order)
    for _ in range(20):
        world.submit(ONE, (1, 2, 3), sampling=FOUR, tenant="busy")
    world.drain_requests()
    world.submit(ONE, (1, 2, 3), sampling=FOUR, tenant="busy")
    world.submit(ONE, (1, 2, 3), sampling=FOUR, tenant="away")
    assert order.given_to("away") == order.given_to("busy") > 0
    world.drain()


def test_who_comes_when_nobody_waits_has_saved_nothing_up() -> None:
    """It begins where the one that was served last stood, and the two share from then on."""
    order = FairOrder()
    world = a_world(order)
    for _ in range(20):
        world.submit(ONE, (1, 2, 3), sampling=FOUR, tenant="busy")
    world.load_all()
    world.drain_requests()
    num_done = len(first_steps(world))
    new = {world.submit(ONE, (1, 2, 3), sampling=FOUR, tenant="new") for _ in range(12)}
    for _ in range(12):
        world.submit(ONE, (1, 2, 3), sampling=FOUR, tenant="busy")
    world.drain()
    num_new = len(new.intersection(first_steps(world)[num_done:][:12]))
    assert 5 <= num_new <= 8, "and not its twelve before all the others"


def test_counters_of_tenants_do_not_pile_up() -> None:
    order = FairOrder()
    world = a_world(order)
    for i in range(4500):
        world.cancel(world.submit(ONE, (1,), sampling=FOUR, tenant=f"t{i}"))
    assert order.num_counters <= 2 * 4098


@pytest.mark.parametrize("seed", range(6))
def test_everyone_gets_what_they_would_get_alone(seed: int) -> None:
    draw = random.Random(seed)
    world = World(some_limits(), num_blocks=24, order=FairOrder(between_adapters=bool(seed % 2)))
    for _ in range(40):
        sampling = SamplingParams(max_new_tokens=draw.randint(1, 8), ignore_eos=True)
        request = world.submit(
            adapter_id(draw.choice([0, 0, 1, 2, 3])),
            draw.choices(range(9), k=draw.randint(1, 12)),
            sampling=sampling,
            tenant=draw.choice(["", "a", "b"]),
            tenant_weight=draw.choice([0.5, 1.0, 3.0]),
        )
        world.load_all()
        for _ in range(draw.randint(0, 2)):
            world.step(cancel=draw.choice([None, None, None, request]))
    world.drain()
    world.check_answers()


def ask(world: World, adapter: AdapterId, tenant: str) -> int:
    """Tokens of the prompt that were found."""
    request = world.submit(adapter, PROMPT, tenant=tenant)
    world.drain_requests()
    return world.finishes[request].num_cached_tokens


@pytest.mark.parametrize("adapter", [BASE, ONE], ids=["base", "adapter"])
def test_what_was_computed_for_a_tenant_is_found_by_that_tenant_alone(adapter: AdapterId) -> None:
    footprints = {BASE: Footprint(num_bytes=0), ONE: Footprint(num_bytes=10, max_rank=8)}
    world = World(some_limits(), footprints=footprints)
    assert ask(world, adapter, "a") == 0
    for tenant in ("b", "", "ab", "1|a"):
        assert ask(world, adapter, tenant) == 0, f"{tenant!r} found what is a's"
    for tenant in ("a", "b", ""):
        assert ask(world, adapter, tenant) == 12
    world.check_answers()
