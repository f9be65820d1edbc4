"""A short prompt is read beside a long one, whoever came first."""

from __future__ import annotations

import pytest

from peft_serve.core import RequestId, SamplingParams
from peft_serve.scheduling.order import FairOrder
from tests.scheduling.world import World, adapter_id, some_limits


def _world(**changes: object) -> World:
    limits = some_limits(**{"max_step_tokens": 16, "max_context": 400, "max_rows": 8} | changes)
    return World(limits, num_blocks=600, order=FairOrder())


def _ask(world: World, length: int, adapter: int | None = None) -> RequestId:
    prompt = [5 + i % 40 for i in range(length)]
    sampling = SamplingParams(max_new_tokens=2, ignore_eos=True)
    return (
        world.submit(prompt=prompt, sampling=sampling)
        if adapter is None
        else world.submit(adapter_id(adapter), prompt, sampling=sampling)
    )


def _steps_until_read(world: World, request: RequestId, *, most: int = 60) -> int:
    for count in range(1, most):
        world.step()
        if world.tokens[request]:
            return count
    raise AssertionError("never")


def test_a_short_prompt_that_comes_later_is_not_behind_a_long_one() -> None:
    world = _world()
    long = _ask(world, 320)
    world.step()
    short = _ask(world, 6)
    assert _steps_until_read(world, short) <= 2
    assert not world.tokens[long]
    world.drain()


def test_nothing_is_left_where_nobody_comes_behind() -> None:
    world = _world()
    long = _ask(world, 320)
    assert _steps_until_read(world, long) == 20


def test_a_long_one_gets_half_of_the_room_at_least() -> None:
    world = _world()
    long = _ask(world, 160)
    world.step()
    for _ in range(40):
        _ask(world, 16)
    rows = []
    while not world.tokens[long]:
        world.step()
        rows += [len(row.tokens) for row in world.steps[-1].rows if row.request == long]
    assert min(rows[:-1]) >= 4  # half of what those that decode leave
    assert len(rows) <= 40
    world.drain()


@pytest.mark.parametrize("length", [3, 40])
def test_who_can_not_start_yet_is_left_nothing(length: int) -> None:
    world = _world(max_rows=1)
    long = _ask(world, 160)
    world.step()
    _ask(world, length)
    assert _steps_until_read(world, long) == 9
    world.drain()
