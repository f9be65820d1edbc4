"""Constrained answers in the scheduler: their masks, their ends, and what breaks."""

from __future__ import annotations

import pytest

from peft_serve.core import FinishReason, SamplingParams
from peft_serve.errors import Internal, InvalidParameter
from tests.scheduling.fake_constraint import Path, Walk
from tests.scheduling.world import EOS, World

ENDS = frozenset({EOS})


def sampling(**changes: object) -> SamplingParams:
    return SamplingParams(**({"max_new_tokens": 20, "seed": 1} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_stays_on_its_path_and_says_where_it_ends(seed: int) -> None:
    world = World()
    path = Path(seed=seed, length=4, eos_ids=ENDS)
    request = world.submit(sampling=sampling(), constraint=path)
    world.drain()
    walk = path.start()
    *words, end = world.tokens[request]
    for token in words:
        walk.accept(token)
    assert end == EOS
    assert world.finishes[request].reason is FinishReason.EOS
    world.check_answers()


def test_an_answer_that_can_say_no_end_ends_when_it_is_complete() -> None:
    world = World()
    path = Path(seed=3, length=4, eos_ids=frozenset())
    request = world.submit(sampling=sampling(ignore_eos=True), constraint=path)
    world.drain()
    assert len(world.tokens[request]) == 4
    assert world.finishes[request].reason is FinishReason.EOS


def test_a_shortest_length_gives_way_to_an_answer_that_is_complete() -> None:
    world = World()
    request = world.submit(sampling=sampling(min_new_tokens=10), constraint=Path(seed=3, length=4, eos_ids=ENDS))
    world.drain()
    assert len(world.tokens[request]) == 5
    assert world.tokens[request][-1] == EOS


def test_length_cuts_an_answer_off() -> None:
    world = World()
    request = world.submit(sampling=sampling(max_new_tokens=2), constraint=Path(seed=3, length=9, eos_ids=ENDS))
    world.drain()
    assert world.finishes[request].reason is FinishReason.LENGTH


def test_a_broken_constraint_fails_its_own_request_only() -> None:
    class Bog(Walk):
        def mask(self) -> bytes:
            if self.tokens:
                raise RuntimeError("no mask here")
            return super().mask()

    class Swamp(Path):
        def start(self) -> Walk:
            return Bog(self)

    world = World()
    broken = world.submit(sampling=sampling(), constraint=Path(seed=1, length=9, eos_ids=ENDS, breaks_at=1))
    worse = world.submit(sampling=sampling(), constraint=Swamp(seed=1, length=9, eos_ids=ENDS))
    fine = [world.submit(sampling=sampling(), constraint=Path(seed=1, length=4, eos_ids=ENDS)), world.submit()]
    world.drain()
    assert isinstance(world.finishes[broken].error, InvalidParameter)
    assert isinstance(world.finishes[worse].error, Internal)
    for request in fine:
        assert world.finishes[request].error is None
        world.check_answer(request)


def test_beams_and_a_constraint_do_not_go_together() -> None:
    world = World()
    with pytest.raises(ValueError, match="beams and a grammar"):
        world.submit(sampling=sampling(num_beams=2), constraint=Path(seed=1, length=4, eos_ids=ENDS))
