"""The prefix cache: what was computed is found again, by those it was computed for and nobody else."""

from __future__ import annotations

import random

import pytest

from peft_serve.core import BASE, AdapterId, Footprint, Reading, RequestId, SamplingParams
from tests.scheduling.world import World, adapter_id, some_limits

FIRST, SECOND, TWIN_A, TWIN_B, LATE, BIDIRECTIONAL = (adapter_id(i) for i in range(6))
START = (8, 9)
FOOTPRINTS = {
    BASE: Footprint(num_bytes=0),
    FIRST: Footprint(num_bytes=10, max_rank=8),
    SECOND: Footprint(num_bytes=10, max_rank=8, num_prefix_tokens=6),
    TWIN_A: Footprint(num_bytes=10, num_prefix_tokens=6, kv_key="twin"),
    TWIN_B: Footprint(num_bytes=10, num_prefix_tokens=6, kv_key="twin"),
    LATE: Footprint(num_bytes=10, max_rank=8, start=START),
    BIDIRECTIONAL: Footprint(num_bytes=10, max_rank=8, is_causal=False),
}
PROMPT = tuple(range(10, 24))  # three blocks of 4 and a half


def a_world(**changes: object) -> World:
    return World(some_limits(**changes), footprints=FOOTPRINTS, num_slots=6, max_bytes=600)


def ask(world: World, adapter: AdapterId = BASE, prompt: tuple[int, ...] = PROMPT, **more: object) -> RequestId:
    """One request from its beginning to its end."""
    request = world.submit(adapter, prompt, **more)  # type: ignore[arg-type]
    world.drain_requests()
    return request


def cached(world: World, request: RequestId) -> int:
    return world.finishes[request].num_cached_tokens


@pytest.mark.parametrize("adapter", [BASE, FIRST, SECOND], ids=["base", "plain", "prefixed"])
def test_the_second_computes_only_what_is_left(adapter: AdapterId) -> None:
    world = a_world()
    one, two = ask(world, adapter), ask(world, adapter)
    prefix = FOOTPRINTS[adapter].num_prefix_tokens
    full = (prefix + len(PROMPT) - 1) // 4 * 4 - prefix
    assert (cached(world, one), cached(world, two)) == (0, full)
    computed = [row for step in world.steps for row in step.rows if row.request == two]
    assert computed[0].start == prefix + full
    world.check_answers()


def test_at_least_one_token_is_computed() -> None:
    world = a_world()
    prompt = PROMPT[:12]
    ask(world, prompt=prompt)
    two = ask(world, prompt=prompt)
    assert cached(world, two) == 8
    world.check_answers()


def test_others_adapters_blocks_are_not_found() -> None:
    world = a_world()
    for adapter in (BASE, FIRST, SECOND, LATE):
        assert cached(world, ask(world, adapter, (*PROMPT[:6], *START, *PROMPT))) == (4 if adapter == LATE else 0)
    world.check_answers()


def test_a_change_at_the_beginning_changes_everything_behind_it() -> None:
    world = a_world()
    ask(world)
    assert cached(world, ask(world, prompt=(9, *PROMPT[1:]))) == 0
    assert cached(world, ask(world, prompt=(*PROMPT[:5], 9, *PROMPT[6:]))) == 4
    world.check_answers()


def test_running_requests_share_too() -> None:
    """And are counted once: the blocks of a shared prompt must not be there twice."""
    world = World(some_limits(max_step_tokens=20), footprints=FOOTPRINTS, num_blocks=9)
    prompt = tuple(range(16))
    sampling = SamplingParams(max_new_tokens=4, ignore_eos=True)
    one = world.submit(BASE, prompt, sampling=sampling)
    world.step()
    two = world.submit(BASE, prompt, sampling=sampling)  # 5 + 2 of 8 blocks; 5 + 5 are not there
    world.step()
    rows = {row.request: row for row in world.steps[-1].rows}
    assert set(rows) == {one, two}
    assert rows[one].blocks[:3] == rows[two].blocks[:3]
    world.drain()
    world.check_answers()


def test_twins_share_what_is_behind_their_prefix() -> None:
    world = a_world()
    ask(world, TWIN_A)
    assert cached(world, ask(world, TWIN_B)) == 10
    world.check_answers()


def test_an_adapter_that_reads_ahead_shares_nothing() -> None:
    world = a_world()
    ask(world, BIDIRECTIONAL)
    assert cached(world, ask(world, BIDIRECTIONAL)) == 0
    world.check_answers()


def test_one_block_in_which_an_adapter_begins_to_act_at_two_places() -> None:
    """What begins in the block may end behind it, in a prompt that is like the other up to there."""
    world = a_world()
    head = (*START, 1, 8)
    ask(world, LATE, (*head, 9, 1, 1, 1, 1))
    assert cached(world, ask(world, LATE, (*head, 1, 1, 1, 1, 1))) == 0
    world.check_answers()


@pytest.mark.parametrize(("reading", "num_cached"), [(Reading.LAST, 12), (Reading.MEAN, 0), (Reading.FIRST, 0)])
def test_a_reading_of_every_token_computes_every_token(reading: Reading, num_cached: int) -> None:
    world = a_world()
    ask(world, reading=reading)
    assert cached(world, ask(world, reading=reading)) == num_cached
    world.check_answers()


def test_answers_are_found_as_the_beginning_of_a_longer_prompt() -> None:
    world = a_world()
    sampling = SamplingParams(max_new_tokens=7, ignore_eos=True)
    one = ask(world, sampling=sampling)
    longer = (*PROMPT, *world.tokens[one], 5)
    assert cached(world, ask(world, prompt=longer)) == 20
    world.check_answers()


def test_a_preempted_request_finds_its_own_blocks() -> None:
    world = World(some_limits(), footprints=FOOTPRINTS, num_blocks=8)
    sampling = SamplingParams(max_new_tokens=12, ignore_eos=True)
    world.submit(BASE, tuple(range(9)), sampling=sampling)
    young = world.submit(FIRST, tuple(range(20, 25)), sampling=sampling)
    world.drain()
    starts = [row.start for step in world.steps for row in step.rows if row.request == young]
    assert sorted(starts) != starts, "it was preempted"
    assert starts.count(0) == 1, "and did not begin from nothing again"
    assert cached(world, young) == 0, "what it computed itself is no hit"
    world.check_answers()


def test_it_can_be_off() -> None:
    world = a_world(prefix_caching=False)
    ask(world)
    assert cached(world, ask(world)) == 0
    assert world.blocks.num_labelled == 0


def test_old_blocks_make_room_for_new_ones() -> None:
    world = World(some_limits(), footprints=FOOTPRINTS, num_blocks=12)
    for first in range(0, 200, 10):
        ask(world, prompt=tuple(range(first, first + 14)))
    assert 0 < world.blocks.num_labelled <= world.blocks.capacity
    assert cached(world, ask(world, prompt=tuple(range(190, 204)))) == 12
    assert cached(world, ask(world, prompt=tuple(range(14)))) == 0
    world.check_answers()


@pytest.mark.parametrize("seed", range(40))
def test_everyone_gets_what_they_would_get_alone(seed: int) -> None:
    """Prompts that begin alike, few blocks, every adapter, cancels and crashes."""
    draw = random.Random(seed)
    world = World(some_limits(), footprints=FOOTPRINTS, num_blocks=draw.choice([14, 20, 40]), num_slots=2)
    adapters = list(FOOTPRINTS)
    stems = [PROMPT[:9], (*PROMPT[:6], *START, *PROMPT[:6]), START * 5]
    for _ in range(30):
        stem = draw.choice(stems)
        prompt = stem[: draw.randint(1, len(stem))] + tuple(draw.choices(range(4), k=draw.randint(0, 5)))
        sampling = SamplingParams(max_new_tokens=draw.randint(1, 9), ignore_eos=True)
        choices = ((1, 2, 3, 4, 5), (2,)) if draw.random() < 0.2 else ()
        request = world.submit(draw.choice(adapters), prompt, sampling=sampling, choices=choices)
        world.load_all()
        for _ in range(draw.randint(0, 3)):
            world.step(crash=draw.choice(["", "", "", "", "late", "early"]), cancel=draw.choice([None, None, request]))
    world.drain()
    world.check_answers()
