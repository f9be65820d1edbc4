"""The fitted time of a step, and what is foretold from it."""

from __future__ import annotations

import random

import pytest

from peft_serve.core import BASE, FinishReason, SamplingParams
from peft_serve.errors import DeadlineMissed
from peft_serve.scheduling.step_time import StepLoad, StepTimeModel
from tests.scheduling.world import World, some_limits

STEP, TOKEN, RANK, POSITION = 0.02, 0.001, 2e-4, 3e-6


def a_load(draw: random.Random) -> StepLoad:
    return StepLoad(
        num_tokens=draw.choice([1, 4, 16, 32, 200]),
        sum_rank=draw.choice([0, 8, 64, 256]),
        num_positions=draw.randint(10, 9000),
    )


def seconds(load: StepLoad) -> float:
    return STEP + TOKEN * load.num_tokens + RANK * load.sum_rank + POSITION * load.num_positions


@pytest.mark.parametrize("outliers", [0.0, 0.02])
def test_the_four_costs_are_found(outliers: float) -> None:
    draw, model = random.Random(1), StepTimeModel()
    for _ in range(600):
        load = a_load(draw)
        measured = seconds(load) * draw.uniform(0.97, 1.03)
        model.observe(load, 30 * measured if draw.random() < outliers else measured)
    for _ in range(50):
        load = a_load(draw)
        assert model.predict(load) == pytest.approx(seconds(load), rel=0.25)
    found = model.coefficients
    assert found["token"] == pytest.approx(TOKEN, rel=0.25)
    assert found["rank"] == pytest.approx(RANK, rel=0.25)


def test_it_follows_a_machine_that_slows_down() -> None:
    draw, model = random.Random(2), StepTimeModel()
    for factor in (1.0, 3.0):
        for _ in range(1500):
            load = a_load(draw)
            model.observe(load, factor * seconds(load))
    load = a_load(draw)
    assert model.predict(load) == pytest.approx(3 * seconds(load), rel=0.2)


def test_thousands_of_equal_steps_leave_it_sane() -> None:
    model, load = StepTimeModel(), StepLoad(num_tokens=16, sum_rank=64, num_positions=900)
    for _ in range(20_000):
        model.observe(load, 0.05)
    assert model.predict(load) == pytest.approx(0.05, rel=0.01)
    other = model.predict(StepLoad(num_tokens=1, sum_rank=0, num_positions=10))
    assert 0.0 <= other < 0.06


def test_before_the_first_step_nothing_is_known() -> None:
    assert StepTimeModel().predict(StepLoad(num_tokens=5, sum_rank=0, num_positions=5)) == 0.0


def a_busy_world() -> World:
    """Steps that take 0.1 s, four rows, and ten requests that wait behind them."""
    world = World(some_limits())
    for _ in range(14):
        world.submit(BASE, (1, 2, 3), sampling=SamplingParams(max_new_tokens=8, ignore_eos=True))
    for _ in range(30):
        world.step()
        world.scheduler.note_time(0.1)
    for _ in range(10):
        world.submit(BASE, (1, 2, 3), sampling=SamplingParams(max_new_tokens=8, ignore_eos=True))
    return world


def test_a_request_that_cannot_be_in_time_is_refused_at_once() -> None:
    world = a_busy_world()
    with pytest.raises(DeadlineMissed, match="first token is expected in") as refused:
        world.submit(BASE, (1, 2), max_wait_s=0.5)
    assert refused.value.retry_after_s is not None
    assert refused.value.retry_after_s >= 1.0
    patient = world.submit(BASE, (1, 2), max_wait_s=60.0)
    world.drain()
    world.check_answers()
    assert world.finishes[patient].reason is not FinishReason.FAILED


def test_a_request_that_waited_in_vain_is_ended_and_gives_everything_back() -> None:
    world = World(some_limits())
    for _ in range(4):
        world.submit(BASE, (1, 2, 3), sampling=SamplingParams(max_new_tokens=30, ignore_eos=True))
    world.step()
    late = world.submit(BASE, (1, 2), max_wait_s=1.0)  # nothing has ended yet: no forecast can tell
    world.drain()
    finish = world.finishes[late]
    assert (finish.reason, type(finish.error)) == (FinishReason.FAILED, DeadlineMissed)
    assert world.tokens[late] == []


def test_a_request_that_has_begun_is_not_ended() -> None:
    world = World(some_limits())
    sampling = SamplingParams(max_new_tokens=30, ignore_eos=True)
    request = world.submit(BASE, (1, 2, 3), sampling=sampling, max_wait_s=0.5)
    world.drain()
    assert len(world.tokens[request]) == 30


def test_an_idle_server_refuses_nobody() -> None:
    world = a_busy_world()
    world.drain_requests()
    request = world.submit(BASE, (1, 2), max_wait_s=1.0)
    world.drain()
    assert world.finishes[request].reason is not FinishReason.FAILED
