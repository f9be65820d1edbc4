"""Requests and adapters take blocks from one pool: what either side does not use the other may, and gives back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_serve.core import BASE, FinishReason, Footprint, SamplingParams
from peft_serve.errors import AdapterUnavailable, PromptTooLong
from peft_serve.scheduling.blocks import BlockLedger
from tests.scheduling.world import World, adapter_id, some_limits

A, B, C, D = map(adapter_id, range(4))


def shared(num_blocks: int = 20, *, kept: int = 0, for_requests: int = 4, **runs: tuple[int, ...]) -> World:
    """Adapters a, b, c of these runs (two blocks each unless said); `num_blocks` to give; what each side has for
    certain."""
    named = {BASE: Footprint(num_bytes=0)}
    for name, adapter in (("a", A), ("b", B), ("c", C), ("d", D)):
        each = runs.get(name, (1, 1))
        named[adapter] = Footprint(num_bytes=sum(each), max_rank=4, runs=each)
    limits = some_limits(num_adapter_blocks=kept, max_context=64, max_step_adapters=4, max_step_rank=64)
    most = num_blocks - for_requests
    return World(limits, footprints=named, num_slots=4, max_bytes=most, num_blocks=num_blocks + 1)


def run(world: World, *wanted: tuple[int, int]) -> None:
    """A request for each (adapter, blocks of its prompt and answer), one after the other."""
    for index, num_blocks in wanted:
        world.submit(adapter_id(index), [1] * (4 * num_blocks - 2), sampling=SamplingParams(max_new_tokens=2, seed=1))
        world.drain_requests()


def resident(world: World) -> set[str]:
    return {one.adapter for one in world.slots.resident()}


def test_a_burst_of_adapters_takes_what_requests_leave_idle_and_gives_it_back() -> None:
    world = shared(12)
    run(world, (0, 2), (1, 2), (2, 2), (3, 2))
    assert resident(world) == {A, B, C, D}
    assert world.scheduler.snapshot().kv_usage == 0.0, "idle adapters would leave for requests"
    long = world.submit(BASE, [1] * 37, sampling=SamplingParams(max_new_tokens=3, seed=1, ignore_eos=True))
    world.drain_requests()
    assert world.finishes[long].reason is FinishReason.LENGTH
    assert resident(world) == {D}, "the least recently used left, no more than it took"
    run(world, (0, 2), (1, 2))
    assert resident(world) == {D, A, B}
    world.check_answers()
    world.drain()


def test_neither_side_takes_what_the_other_has_for_certain() -> None:
    world = shared(12, kept=6, for_requests=6)
    many = [world.submit(BASE, [1] * 10, sampling=SamplingParams(max_new_tokens=6, seed=1)) for _ in range(3)]
    while world.step():
        assert world.blocks.capacity - world.blocks.num_free <= 6, "half of the blocks are kept for adapters"
    assert all(request in world.finishes for request in many)
    run(world, (0, 2), (1, 2), (2, 2), (3, 2))
    assert len(resident(world)) == 3, "adapters end where the blocks of requests begin"
    world.check_answers()
    world.drain()


def test_a_prompt_that_only_fits_without_its_adapter_is_too_long() -> None:
    world = shared(12, a=(4, 4))
    too_long = world.submit(A, [1] * 17)
    fits = world.submit(A, [1] * 14, sampling=SamplingParams(max_new_tokens=2, seed=1))
    world.drain_requests()
    assert isinstance(world.finishes[too_long].error, PromptTooLong)
    assert world.finishes[fits].error is None
    world.drain()


def test_who_waits_for_neighbours_gets_them_when_others_leave() -> None:
    world = shared(12, c=(5,), d=(1,))
    run(world, (0, 2), (1, 2))
    first = world.submit(A, [1] * 14, sampling=SamplingParams(max_new_tokens=20, seed=1, ignore_eos=True))
    world.step()
    wanting = world.submit(C, [1] * 3, sampling=SamplingParams(max_new_tokens=2, seed=1, ignore_eos=True))
    world.drain_requests()
    assert world.finishes[first].reason is world.finishes[wanting].reason is FinishReason.LENGTH
    world.check_answers()
    world.drain()


def test_neighbours_that_pinned_adapters_split_are_told() -> None:
    world = shared(11, for_requests=1, b=(1,), c=(7,), d=(5,))
    world.scheduler.pin(B)
    run(world, (3, 1), (1, 1), (2, 1))
    error = list(world.finishes.values())[-1].error
    assert isinstance(error, AdapterUnavailable)
    assert "7 neighbouring" in error.message
    assert error.retry_after_s
    world.scheduler.unpin(B)
    run(world, (2, 1))
    assert list(world.finishes.values())[-1].error is None
    world.drain()


def test_a_pin_keeps_an_adapters_blocks_from_requests() -> None:
    world = shared(12)
    world.scheduler.pin(A)
    run(world, (0, 2))
    too_long = world.submit(BASE, [1] * 41)
    world.drain_requests()
    error = world.finishes[too_long].error
    assert isinstance(error, PromptTooLong)
    assert "has 10 for it beside 2 that pinned adapters hold" in error.message


# ---- the ledger


@settings(max_examples=60, deadline=None)
@given(
    acts=st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(1, 4), min_size=1, max_size=4)), max_size=25),
    spacing=st.sampled_from([1, 6]),
)
def test_runs_are_neighbours_that_nobody_else_has(acts: list[tuple[int, list[int]]], spacing: int) -> None:
    ledger = BlockLedger(num_blocks=14, block_size=4, spacing=spacing)
    held: list[tuple[int, ...]] = []
    labels = 0
    for kind, lengths in acts:
        if kind == 0 and held:
            ledger.release(held.pop(len(lengths) % len(held)))
        elif kind == 1:
            blocks = ledger.allocate(len(lengths))
            if blocks is not None:
                labels += 1
                ledger.label(blocks[0], bytes([labels]))
                held.append(blocks)
        else:
            could = ledger.has_runs(lengths)
            found = ledger.allocate_runs(lengths)
            assert (found is not None) == could
            if found is None:
                assert max(lengths) > 1 or len(lengths) > ledger.num_free, "single blocks are given while there are any"
                continue
            firsts, blocks = found
            at = [first + i * spacing for first, length in zip(firsts, lengths, strict=True) for i in range(length)]
            assert tuple(at) == blocks
            held.append(blocks)
        assert all(block % spacing == 0 for blocks in held for block in blocks)
        ledger.check(held)
    assert ledger.numbers == set(range(spacing, 14 * spacing, spacing))


def test_runs_lie_where_single_blocks_are_given_last() -> None:
    ledger = BlockLedger(num_blocks=11, block_size=4)
    assert ledger.allocate(2) == (1, 2)
    assert ledger.allocate_runs((1, 3)) == ((7, 8), (7, 8, 9, 10))
    assert ledger.allocate_runs((1,)) == ((6,), (6,))
    assert ledger.allocate(1) == (3,)
    assert not ledger.has_runs((3,))
    assert ledger.has_runs((3,), (3,))
    assert replace(Footprint(num_bytes=0), runs=(3,)).runs == (3,)


@pytest.mark.parametrize("lengths", [(1,), (2,)])
def test_blocks_that_are_only_remembered_are_given_to_adapters(lengths: tuple[int, ...]) -> None:
    ledger = BlockLedger(num_blocks=3, block_size=4)
    blocks = ledger.allocate(2)
    assert blocks is not None
    for place, block in enumerate(blocks):
        ledger.label(block, bytes([place]))
    ledger.release(blocks)
    assert ledger.allocate_runs(lengths) is not None
    assert ledger.num_labelled == 2 - sum(lengths)
    ledger.check()
