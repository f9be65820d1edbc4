"""Requests that read: on a decoder over the parts of their prompt, on an encoder whole and in one step."""

from __future__ import annotations

import pytest

from peft_serve.core import BASE, FinishReason, Reading, SamplingParams
from peft_serve.errors import InvalidParameter, PromptTooLong
from tests.scheduling.fake_model import HEAD_READINGS, has_head
from tests.scheduling.world import World, adapter_id, some_footprints, some_limits

READABLE = [reading for reading in Reading if has_head(BASE, reading)]


def encoder_world(**changes: object) -> World:
    return World(some_limits(is_encoder=True, **changes), num_blocks=2)


@pytest.mark.parametrize("reading", READABLE)
def test_a_decoder_reads_a_prompt_longer_than_a_step(reading: Reading) -> None:
    world = World(some_limits(max_step_tokens=4))
    request = world.submit(prompt=range(11), reading=reading)
    world.drain()
    world.check_answers()
    assert [len(step.rows[0].tokens) for step in world.steps] == [4, 4, 3]
    num_rows = 11 if reading in (Reading.TOKENS, Reading.SPANS) else 1
    assert len(world.readings[request].rows) == num_rows


def test_a_reading_shares_its_step_with_those_who_generate() -> None:
    world = World(some_limits(max_step_tokens=12))
    world.submit(sampling=SamplingParams(max_new_tokens=6, seed=1, ignore_eos=True))
    world.step()
    world.submit(prompt=(4, 5, 6), reading=Reading.LAST)
    world.step()
    assert [row.draw is None for row in world.steps[-1].rows] == [False, True]
    world.drain()
    world.check_answers()


def test_a_decoders_reading_needs_no_room_for_a_next_token() -> None:
    world = World(some_limits(max_context=8))
    fits = world.submit(prompt=range(8), reading=Reading.MEAN)
    fails = world.submit(prompt=range(9), reading=Reading.MEAN)
    world.drain()
    assert world.finishes[fits].reason is FinishReason.READ
    assert isinstance(world.finishes[fails].error, PromptTooLong)


def test_what_was_read_before_a_preemption_is_read_again_and_counted_once() -> None:
    world = World(some_limits(max_step_tokens=4, block_size=1, max_context=20), num_blocks=13)
    first = world.submit(prompt=(1, 2), sampling=SamplingParams(max_new_tokens=9, seed=1, ignore_eos=True))
    adapter = next(adapter_id(i) for i in (0, 3, 5) if has_head(adapter_id(i), Reading.TOKENS))
    world.submit(adapter, (1,), reading=Reading.LAST)
    world.load_all()
    world.step()
    request = world.submit(adapter, range(9), reading=Reading.TOKENS)
    world.drain()
    world.check_answers()
    starts = [row.start for step in world.steps for row in step.rows if row.request == request]
    assert starts.count(0) > 1, "the request was to be preempted"
    assert len(world.readings[request].rows) == 9
    assert world.finishes[first].reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("prompt", "read"), [((1, 2, 0, 0), (1, 2)), ((1, 0, 2), (1, 0, 2)), ((0, 0), (0,))], ids=["tail", "inside", "all"]
)
def test_a_decoders_sequence_ends_before_its_padding(prompt: tuple[int, ...], read: tuple[int, ...]) -> None:
    world = World(some_limits(pad_id=0))
    world.submit(prompt=prompt, reading=Reading.SEQUENCE)
    whole = world.submit(prompt=prompt, reading=Reading.LAST)
    world.drain()
    first, second = world.steps[0].rows
    assert (first.tokens, second.tokens) == (read, prompt)
    assert world.finishes[whole].num_prompt_tokens == len(prompt)


def test_an_encoder_reads_each_request_in_one_step_without_blocks() -> None:
    world = encoder_world(max_step_tokens=10)
    requests = [world.submit(prompt=range(4), reading=Reading.FIRST, segments=(0, 0, 1, 1)) for _ in range(5)]
    world.drain()
    world.check_answers()
    assert [len(step.rows) for step in world.steps] == [2, 2, 1]
    assert all(world.finishes[r].num_prompt_tokens == 4 for r in requests)
    assert {row.segments for step in world.steps for row in step.rows} == {(0, 0, 1, 1)}


def test_a_text_longer_than_a_step_is_the_first_of_one() -> None:
    world = encoder_world(max_step_tokens=4)
    for length in (30, 2, 30):
        world.submit(prompt=range(length), reading=Reading.LAST)
    world.drain()
    world.check_answers()
    assert [[len(row.source) for row in step.rows] for step in world.steps] == [[30], [2], [30]]


def test_virtual_tokens_count_as_an_encoders_context() -> None:
    world = encoder_world(max_context=10)
    adapter = adapter_id(1)
    assert world.footprints[adapter].num_source_tokens == 3
    fits = world.submit(adapter, range(7), reading=Reading.LAST)
    fails = world.submit(adapter, range(8), reading=Reading.LAST)
    world.drain()
    assert world.finishes[fits].reason is FinishReason.READ
    assert "3 of them the adapter's" in str(world.finishes[fails].error)


@pytest.mark.parametrize("is_encoder", [False, True], ids=["decoder", "encoder"])
def test_a_reading_that_no_head_gives_fails_alone(is_encoder: bool) -> None:
    footprints = some_footprints(12, is_encoder=is_encoder)
    world = World(some_limits(is_encoder=is_encoder, max_step_tokens=60), footprints=footprints, num_slots=12)
    wishes = [(adapter, reading) for adapter in footprints for reading in HEAD_READINGS]
    requests = [world.submit(adapter, (1, 2, 3), reading=reading) for adapter, reading in wishes]
    world.drain()
    world.check_answers()
    failed = {r for r in requests if isinstance(world.finishes[r].error, InvalidParameter)}
    assert 0 < len(failed) < len(requests)


@pytest.mark.parametrize(
    ("changes", "request_fields", "words"),
    [
        ({"is_encoder": True}, {}, "give it a reading"),
        ({"is_encoder_decoder": True}, {"reading": Reading.LAST}, "only generates"),
        ({}, {"reading": Reading.LAST, "choices": [[1]]}, "give one of them"),
        ({}, {"reading": Reading.LAST, "segments": [0]}, "one for each prompt token"),
    ],
    ids=["text of an encoder", "reading of an encoder-decoder", "choices and a reading", "too few segments"],
)
def test_what_no_step_could_serve_is_not_queued(
    changes: dict[str, object], request_fields: dict[str, object], words: str
) -> None:
    world = World(some_limits(**changes))
    with pytest.raises(ValueError, match=words):
        world.submit(prompt=(1, 2, 3), **request_fields)  # type: ignore[arg-type]
    assert not world.scheduler.has_work
