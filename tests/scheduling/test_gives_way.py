"""Who has all rows gives back what is beyond its share, once somebody else waits; and nobody is sent back and forth."""

from __future__ import annotations

from collections import Counter

import pytest

from peft_serve.core import RequestId, SamplingParams
from peft_serve.scheduling.order import ArrivalOrder, FairOrder
from tests.scheduling.world import World, adapter_id, some_limits

ROWS = 8


def _world(order: FairOrder | ArrivalOrder, **changes: object) -> World:
    limits = some_limits(
        **{"max_rows": ROWS, "max_step_tokens": 64, "max_step_rank": 999, "max_context": 200} | changes
    )
    return World(limits, num_blocks=800, num_slots=6, max_bytes=600, order=order)


def _ask(
    world: World, tenant: str = "", *, adapter: int | None = None, tokens: int = 60, weight: float = 1.0
) -> RequestId:
    sampling = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    prompt = [5 + len(world.requests) % 40, 6, 7]
    named = () if adapter is None else (adapter_id(adapter),)
    return world.submit(*named, prompt=prompt, sampling=sampling, tenant=tenant, tenant_weight=weight)


def _flooded(world: World, tenant: str = "flood", **kwargs: int) -> None:
    for _ in range(3 * ROWS):
        _ask(world, tenant, **kwargs)
    for _ in range(4):
        world.step()


def _holders(world: World) -> Counter[str]:
    return Counter(tracked.request.tenant for tracked in world.scheduler._roster.running.values())


def test_a_tenant_that_has_all_rows_gives_one_to_another_at_once() -> None:
    world = _world(FairOrder(between_adapters=False))
    _flooded(world)
    assert _holders(world) == {"flood": ROWS}
    late = _ask(world, "support", tokens=3)
    for _ in range(4):
        world.step()
    assert len(world.tokens[late]) >= 2
    world.drain()  # what was sent back gets what it would have got alone: the world compares


@pytest.mark.parametrize(("weight", "rows"), [(1.0, 4), (3.0, 6)])
def test_shares_of_rows_are_as_the_weights(weight: float, rows: int) -> None:
    world = _world(FairOrder(between_adapters=False))
    _flooded(world)
    for _ in range(ROWS):
        _ask(world, "support", weight=weight)
    for _ in range(ROWS + 2):
        world.step()
    assert _holders(world)["support"] == rows
    before = len(world.finishes)
    seen = set()
    for _ in range(12):
        world.step()
        seen.add(frozenset(world.scheduler._roster.running))
    assert len(world.finishes) > before or len(seen) == 1, "rows change hands while nobody ends"
    world.drain()


def test_who_waits_behind_the_first_has_its_weight_too() -> None:
    world = _world(FairOrder(between_adapters=False))
    _flooded(world)
    for tenant, weight in (("support", 1.0), ("research", 6.0)):
        for _ in range(ROWS):
            _ask(world, tenant, weight=weight)
    most = 0
    for _ in range(2 * ROWS):
        world.step()
        most = max(most, _holders(world)["support"])
    assert most == 1, "a share is of all that wait, with their weights"
    assert _holders(world) == {"flood": 1, "support": 1, "research": 6}
    world.drain()


def test_adapters_of_one_tenant_share_too_in_fair_order() -> None:
    world = _world(FairOrder(), max_step_adapters=4)
    _flooded(world, "")
    late = _ask(world, "", adapter=0, tokens=3)
    world.ask()
    world.finish_load(adapter_id(0))
    for _ in range(5):
        world.step()
    assert len(world.tokens[late]) >= 2
    world.drain()


def test_by_arrival_nobody_gives_way() -> None:
    world = _world(ArrivalOrder())
    _flooded(world)
    late = _ask(world, "support", tokens=3)
    for _ in range(6):
        world.step()
    assert not world.tokens[late]
    world.drain()


def test_a_search_of_many_beams_sends_nobody_back() -> None:
    world = _world(FairOrder(between_adapters=False))
    _flooded(world)
    sampling = SamplingParams(max_new_tokens=3, num_beams=2)
    world.submit(prompt=[5, 6, 9], sampling=sampling, tenant="support")
    running = set(world.scheduler._roster.running)
    world.step()
    assert set(world.scheduler._roster.running) == running
    world.drain()
