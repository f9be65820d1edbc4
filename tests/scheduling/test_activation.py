"""From which token on an adapter acts: the search, and what rows say through chunks, preemption and choices."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from peft_serve.core import BASE, Footprint, SamplingParams
from peft_serve.scheduling.activation import NEVER, active_from, last_occurrence
from tests.scheduling.world import World, adapter_id, some_limits

START = (7, 7, 8)
PLAIN, LATE, BEHIND = adapter_id(0), adapter_id(1), adapter_id(2)
FOOTPRINTS = {
    BASE: Footprint(num_bytes=0),
    PLAIN: Footprint(num_bytes=10, max_rank=8),
    LATE: Footprint(num_bytes=10, max_rank=8, start=START),
    BEHIND: Footprint(num_bytes=10, max_rank=8, start=START, num_prefix_tokens=6),
}


def naive(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    places = [i for i in range(len(tokens)) if tuple(tokens[i : i + len(wanted)]) == tuple(wanted)]
    return max(places, default=None)


@given(st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), min_size=1, max_size=6))
@example([0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0])
def test_the_last_occurrence(tokens: list[int], wanted: list[int]) -> None:
    assert last_occurrence(tokens, wanted) == naive(tokens, wanted)


def test_repeats_cost_no_more_than_their_length() -> None:
    tokens = [1] * 100_000
    began_s = time.perf_counter()
    assert last_occurrence(tokens, [2] + [1] * 50_000) is None
    assert time.perf_counter() - began_s < 5, "some 200 thousand comparisons, not billions"


def test_positions_count_the_prefix() -> None:
    assert active_from([1, 2, 3], (), prefix=4) == 0
    assert active_from([1, 2, 3], (2, 3), prefix=4) == 5
    assert active_from([1, 2, 3], (3, 2), prefix=4) == NEVER


PROMPTS = {
    "absent": ((7, 8, 1, 2, 3, 4, 7), None),
    "first": ((7, 7, 8, 1, 2, 3, 4), 0),
    "repeated": ((7, 7, 8, 1, 7, 7, 7, 8, 2), 5),
    "last": ((1, 2, 3, 4, 7, 7, 8), 4),
}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize(("adapter", "prefix"), [(LATE, 0), (BEHIND, 6)])
def test_every_row_of_a_request_says_the_same(name: str, adapter: str, prefix: int) -> None:
    """Whatever the chunks; what is drawn later never moves it, even if it spells the sequence."""
    prompt, place = PROMPTS[name]
    world = World(some_limits(max_step_tokens=3), footprints=FOOTPRINTS)
    late = world.submit(
        adapter_id(int(adapter[-1])), prompt, sampling=SamplingParams(max_new_tokens=8, ignore_eos=True)
    )
    others = {world.submit(PLAIN, prompt), world.submit(BASE, prompt)}
    world.drain()
    rows = [row for step in world.steps for row in step.rows]
    own = [row for row in rows if row.request == late]
    assert len([row for row in own if row.draw is None]) >= 2, "the prompt came in chunks"
    assert {row.active_from for row in own} == {NEVER if place is None else prefix + place}
    assert {row.active_from for row in rows if row.request in others} == {0}


def test_a_preempted_request_starts_again_at_the_same_token() -> None:
    world = World(some_limits(prefix_caching=False), footprints=FOOTPRINTS, num_blocks=8)
    sampling = SamplingParams(max_new_tokens=12, ignore_eos=True)
    old = world.submit(PLAIN, range(9), sampling=sampling)
    young = world.submit(LATE, (1, 2, *START, 4), sampling=sampling)
    world.drain()
    rows = [row for step in world.steps for row in step.rows if row.request == young]
    assert sum(row.start == 0 for row in rows) >= 2, "it was preempted"
    assert {row.active_from for row in rows} == {2}
    assert len(world.tokens[old]) == len(world.tokens[young]) == 12


def test_choices_are_behind_the_prompt() -> None:
    """A choice is not searched: the adapter acts on all of it, or on none of it."""
    world = World(some_limits(max_step_tokens=20), footprints=FOOTPRINTS)
    acting = world.submit(LATE, (1, *START), choices=[START, (1, 2, 3)])
    idle = world.submit(LATE, (1, 2), choices=[(*START, 1), (1, 2, 3)])
    world.drain()
    rows = [row for step in world.steps for row in step.rows]
    assert {row.active_from for row in rows if row.request == acting} == {1}
    assert {row.active_from for row in rows if row.request == idle} == {NEVER}
    assert {row.branch for row in rows} == {0, 1, 2}
