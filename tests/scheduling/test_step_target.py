"""Parts of prompts are as long as the time of a step allows, and never so short that nobody gets on."""

from __future__ import annotations

import pytest

from peft_serve.core import SamplingParams
from peft_serve.scheduling.step_time import StepLoad
from tests.scheduling.world import World, some_limits

TOKEN_S, STEP_S = 0.001, 0.02


def _world(max_step_s: float | None, *, knows: bool = True, **changes: object) -> World:
    limits = some_limits(
        **{"max_step_tokens": 512, "max_context": 1024, "max_rows": 32, "max_step_s": max_step_s} | changes
    )
    world = World(limits, num_blocks=1200)
    for number in range(200 if knows else 0):
        tokens = 1 + number * 7 % 97
        load = StepLoad(num_tokens=tokens, sum_rank=number % 3 * 8, num_positions=number * 5 % 89)
        world.scheduler._step_time.observe(load, STEP_S + TOKEN_S * tokens)
    return world


def _parts(world: World) -> list[int]:
    """Tokens of the prompt of the request that came last, step by step."""
    last = next(reversed(world.requests))
    world.drain()
    rows = [row for step in world.steps for row in step.rows if row.request == last]
    return [len(row.tokens) for row in rows if len(row.tokens) > 1]


def _long(world: World, num_tokens: int = 400) -> None:
    sampling = SamplingParams(max_new_tokens=1)
    world.submit(prompt=[5 + i % 40 for i in range(num_tokens)], sampling=sampling)


@pytest.mark.parametrize(("max_step_s", "part"), [(0.1, 80), (0.05, 30), (None, 400), (5.0, 400)])
def test_a_part_takes_no_longer_than_a_step_may(max_step_s: float | None, part: int) -> None:
    world = _world(max_step_s)
    _long(world)
    parts = _parts(world)
    assert sum(parts) == 400
    assert max(parts) == pytest.approx(part, abs=2)


def test_before_the_time_of_a_step_is_known_its_tokens_alone_count() -> None:
    world = _world(0.01, knows=False)
    _long(world)
    assert _parts(world)[0] == 400


def test_a_step_that_takes_too_long_anyway_reads_on_all_the_same() -> None:
    world = _world(0.001)
    _long(world, 100)
    assert _parts(world) == [16] * 6 + [4]


def test_where_many_decode_as_many_tokens_of_prompts_are_read() -> None:
    world = _world(0.001)
    for number in range(24):
        world.submit(prompt=(number + 5, 6, 7), sampling=SamplingParams(max_new_tokens=60, ignore_eos=True))
    for _ in range(12):
        world.step()
    _long(world, 120)
    parts = _parts(world)
    assert sum(parts) == 120
    assert parts[0] == 24


def test_a_row_that_decodes_is_in_every_step() -> None:
    world = _world(0.001)
    decoding = world.submit(prompt=(5, 6), sampling=SamplingParams(max_new_tokens=20, ignore_eos=True))
    world.step()
    began = len(world.steps)
    _long(world, 100)
    world.drain()
    busy = world.steps[began : began + 7]
    assert all(any(row.request == decoding for row in step.rows) for step in busy)


def test_a_limit_is_a_time() -> None:
    with pytest.raises(ValueError, match="max_step_s is 0"):
        some_limits(max_step_s=0.0)
