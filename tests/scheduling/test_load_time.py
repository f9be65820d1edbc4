"""How long a request waited for its adapter: from its arrival to the end of the load, or not at all."""

from __future__ import annotations

import pytest

from tests.scheduling.world import World, adapter_id


def test_the_wait_for_a_load_is_told_and_is_part_of_the_queue() -> None:
    world = World()
    first = world.submit(adapter_id(0))
    base = world.submit()
    world.now_s += 1.0
    world.ask()
    late = world.submit(adapter_id(0))
    world.now_s += 2.0
    world.finish_load(adapter_id(0))
    world.now_s += 4.0
    after = world.submit(adapter_id(0))
    world.drain()
    loads = {request: world.finishes[request].load_s for request in (first, base, late, after)}
    assert loads == pytest.approx({first: 3.0, base: 0.0, late: 2.0, after: 0.0})
    assert world.finishes[first].queue_s == pytest.approx(7.1)


def test_a_load_that_fails_is_waited_for_too() -> None:
    world = World()
    request = world.submit(adapter_id(0))
    world.ask()
    world.now_s += 5.0
    world.finish_load(adapter_id(0), error=RuntimeError("damaged"))
    assert world.finishes[request].load_s == pytest.approx(5.0)
