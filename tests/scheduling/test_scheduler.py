"""What the scheduler does in the cases that have a name."""

from __future__ import annotations

import pytest

from peft_serve.core import BASE, FinishReason, Footprint, Install, SamplingParams, StepResult
from peft_serve.errors import AdapterUnavailable, PromptTooLong, QueueFull
from peft_serve.scheduling.blocks import BlockLedger
from peft_serve.scheduling.scheduler import Scheduler
from peft_serve.scheduling.slots import SlotLedger
from tests.scheduling.world import EOS, World, adapter_id, some_limits

LORA = Footprint(num_bytes=10, max_rank=8)
A, B, C, D = (adapter_id(index) for index in range(4))


def greedy(max_new_tokens: int, **changes: object) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, **changes)  # type: ignore[arg-type]


def lora_world(**changes: object) -> World:
    """Four rank-8 adapters over two slots, unless told otherwise."""
    shape = {"num_slots": 2, "max_bytes": 100, "num_blocks": 60} | {
        name: changes.pop(name) for name in ("num_slots", "max_bytes", "num_blocks") if name in changes
    }
    footprints = {BASE: Footprint(num_bytes=0), A: LORA, B: LORA, C: LORA, D: LORA}
    return World(some_limits(**changes), footprints=footprints, **shape)  # type: ignore[arg-type]


class TestSteps:
    def test_a_prompt_is_computed_in_chunks_beside_decode_rows(self) -> None:
        world = lora_world(max_step_tokens=4)
        first = world.submit(prompt=[1], sampling=greedy(9))
        world.step()
        second = world.submit(prompt=range(7), sampling=greedy(1))
        for _ in range(3):
            world.step()
        chunks = [len(row.tokens) for step in world.steps for row in step.rows if row.request == second]
        assert chunks == [3, 3, 1]
        assert len(world.tokens[first]) == 4
        world.drain()
        world.check_answers()

    def test_only_the_last_prompt_row_draws(self) -> None:
        world = lora_world(max_step_tokens=4)
        world.submit(prompt=range(6), sampling=greedy(2, seed=11))
        world.drain()
        draws = [step.rows[0].draw for step in world.steps]
        assert draws[0] is None
        assert [(draw.seed, draw.index) for draw in draws[1:] if draw] == [(11, 0), (11, 1)]

    def test_histories_are_filled_only_when_needed(self) -> None:
        world = lora_world()
        world.submit(prompt=[5, 6], sampling=greedy(2))
        plain = world.submit(prompt=[5, 6], sampling=greedy(2, repetition_penalty=1.5))
        world.drain()
        first, second = world.steps[1].rows
        assert first.draw is not None
        assert second.draw is not None
        assert (first.draw.prompt_history, first.draw.output_history) == ((), ())
        assert second.draw.prompt_history == (5, 6)
        assert second.draw.output_history == tuple(world.tokens[plain][:1])

    @pytest.mark.parametrize(("ignore_eos", "expected"), [(False, [(EOS,), (EOS,), ()]), (True, [(), (), ()])])
    def test_the_end_is_held_back(self, ignore_eos: bool, expected: list[tuple[int, ...]]) -> None:
        world = lora_world()
        params = SamplingParams(max_new_tokens=3, min_new_tokens=2, ignore_eos=ignore_eos)
        world.submit(prompt=[4], sampling=params)
        world.drain()
        assert [step.rows[0].draw.suppress for step in world.steps if step.rows[0].draw] == expected

    def test_eos_is_given_and_ends(self) -> None:
        world = lora_world()
        for token in range(60):
            world.submit(prompt=[token % 11, token // 11], sampling=SamplingParams(max_new_tokens=12))
        world.drain()
        ended = [r for r, finish in world.finishes.items() if finish.reason is FinishReason.EOS]
        assert ended
        assert all(world.tokens[r][-1] == EOS and EOS not in world.tokens[r][:-1] for r in ended)
        world.check_answers()

    def test_a_full_context_ends_with_length(self) -> None:
        world = lora_world(max_context=10)
        request = world.submit(prompt=range(6), sampling=greedy(50))
        world.drain()
        assert len(world.tokens[request]) == 4
        assert world.finishes[request].reason is FinishReason.LENGTH

    def test_a_finish_counts(self) -> None:
        world = lora_world()
        request = world.submit(prompt=range(6), sampling=greedy(3))
        world.now_s += 2.0
        world.drain()
        finish = world.finishes[request]
        assert (finish.num_prompt_tokens, finish.num_output_tokens) == (6, 3)
        assert finish.queue_s == pytest.approx(2.1)


class TestAdapters:
    def test_one_load_serves_all_waiters_and_holds_up_nobody(self) -> None:
        world = lora_world()
        world.submit(A)
        world.submit(A)
        base = world.submit(BASE, sampling=greedy(2))
        world.ask()
        world.submit(A)
        world.ask()
        assert world.loads == [A]
        assert world.scheduler.snapshot().num_loading == 3
        world.step()
        world.step()
        assert world.finishes[base].reason is FinishReason.LENGTH
        world.finish_load(A)
        assert world.scheduler.claims == {A}
        world.step()
        assert world.steps[-1].installs == (Install(slot=1, adapter=A),)
        assert len(world.steps[-1].rows) == 3
        assert world.scheduler.claims == frozenset()
        world.drain()
        world.check_answers()

    def test_loads_are_asked_for_in_queue_order_and_few_at_a_time(self) -> None:
        world = lora_world(max_loads=2)
        for adapter in (C, A, C, D, B):
            world.submit(adapter)
        world.ask()
        assert world.loads == [C, A]
        world.finish_load(A)
        world.step()
        world.ask()
        assert world.loads == [C, A, D]

    def test_the_head_of_the_queue_is_asked_for_beyond_the_bound(self) -> None:
        world = lora_world(max_loads=1, max_rows=1)
        first = world.submit(A)
        second = world.submit(B)
        world.ask()
        world.cancel(first)
        world.ask()
        assert world.loads == [A, B]
        world.drain()
        assert world.finishes[second].reason is FinishReason.LENGTH

    def test_a_failed_load_fails_its_waiters_only(self) -> None:
        world = lora_world()
        bad = [world.submit(A), world.submit(A)]
        good = world.submit(B)
        world.ask()
        error = AdapterUnavailable("corrupt")
        world.finish_load(A, error=error)
        assert [world.finishes[r].error for r in bad] == [error, error]
        world.drain()
        world.check_answer(good)
        assert world.finishes[good].reason is FinishReason.LENGTH

    def test_a_failed_install_fails_its_requests_only_and_frees_the_slot(self) -> None:
        world = lora_world()
        bad, good = world.submit(A), world.submit(B)
        world.load_all()
        later = world.submit(A)
        world.step(broken=A)
        assert isinstance(world.finishes[bad].error, AdapterUnavailable)
        assert isinstance(world.finishes[later].error, AdapterUnavailable)
        assert world.slots.slot_of(A) is None
        again = world.submit(A)
        world.drain()
        assert world.loads == [A, B, A]
        for request in (good, again):
            assert world.finishes[request].reason is FinishReason.LENGTH
            world.check_answer(request)

    def test_an_evicted_adapter_is_asked_for_again(self) -> None:
        world = lora_world(num_slots=1)
        for adapter in (A, B, A):
            world.submit(adapter, sampling=greedy(1))
            while world.scheduler.has_work:
                world.load_all()
                world.step()
        assert world.loads == [A, B, A]
        assert [step.removes for step in world.steps] == [(), (1,), (1,)]
        world.check_answers()

    def test_the_host_copy_is_claimed_until_the_install_was_run(self) -> None:
        world = lora_world()
        request = world.submit(A)
        world.load_all()
        step = world.scheduler.plan()
        assert step is not None
        world.scheduler.cancel(request)
        assert world.scheduler.claims == {A}
        world.scheduler.commit(world.model.run(step))
        assert world.scheduler.claims == frozenset()
        world.check_empty()

    def test_a_host_copy_that_its_slot_reads_is_claimed_as_long_as_the_slot_is_taken(self) -> None:
        world = lora_world(reads_host_copies=True)
        request = world.submit(A)
        world.load_all()
        world.drain_requests()
        assert world.finishes[request].reason is FinishReason.LENGTH
        assert world.scheduler.claims == {A}
        assert world.scheduler.evict(A)
        assert world.scheduler.claims == frozenset()

    def test_a_ready_adapter_nobody_waits_for_is_let_go(self) -> None:
        world = lora_world()
        request = world.submit(A)
        world.load_all()
        assert world.scheduler.claims == {A}
        world.cancel(request)
        assert world.scheduler.claims == frozenset()
        world.submit(A)
        world.drain()
        assert world.loads == [A, A]

    def test_an_adapter_in_use_is_not_evicted(self) -> None:
        world = lora_world()
        world.submit(A)
        world.load_all()
        world.step()
        assert not world.scheduler.evict(A)
        world.drain()

    def test_a_pinned_adapter_stays(self) -> None:
        world = lora_world(num_slots=2)
        world.scheduler.pin(A)
        for adapter in (A, B, C, D, A):
            world.submit(adapter, sampling=greedy(1))
            while world.scheduler.has_work:
                world.load_all()
                world.step()
        assert world.loads == [A, B, C, D]
        assert [r.adapter for r in world.scheduler.snapshot().resident if r.is_pinned] == [A]
        world.scheduler.unpin(A)
        assert world.scheduler.evict(A)

    def test_pins_everywhere_refuse_instead_of_waiting_for_ever(self) -> None:
        world = lora_world(num_slots=1)
        world.scheduler.pin(A)
        world.submit(A, sampling=greedy(1))
        refused = world.submit(B)
        world.drain()
        assert isinstance(world.finishes[refused].error, AdapterUnavailable)

    def test_too_large_an_adapter_fails_alone(self) -> None:
        world = lora_world(max_bytes=9)
        bad, good = world.submit(A), world.submit(BASE)
        world.drain()
        assert isinstance(world.finishes[bad].error, AdapterUnavailable)
        world.check_answer(good)


class TestPrefixes:
    def prefix_world(self, num_tokens: int, *, num_blocks: int = 20) -> World:
        footprint = Footprint(num_bytes=1, num_prefix_tokens=num_tokens)
        footprints = {BASE: Footprint(num_bytes=0), A: footprint, B: footprint}
        return World(some_limits(max_step_tokens=20), footprints=footprints, num_blocks=num_blocks)

    def test_full_blocks_are_shared_and_the_last_is_copied(self) -> None:
        world = self.prefix_world(6)
        world.submit(A)
        world.submit(A)
        world.load_all()
        world.step()
        step = world.steps[0]
        first, second = step.rows
        blocks = step.installs[0].blocks
        assert len(blocks) == 2
        assert first.start == second.start == 6
        assert first.blocks[0] == second.blocks[0] == blocks[0]
        assert step.copies == ((blocks[1], first.blocks[1]), (blocks[1], second.blocks[1]))
        world.drain()
        world.check_answers()

    def test_idle_prefixes_make_room(self) -> None:
        world = self.prefix_world(20, num_blocks=10)
        world.submit(A, sampling=greedy(1))
        while world.scheduler.has_work:
            world.load_all()
            world.step()
        assert world.blocks.num_free == 4
        world.submit(BASE, prompt=range(20), sampling=greedy(1))
        world.step()
        assert world.slots.slot_of(A) is None
        world.drain()
        world.check_answers()

    def test_a_pinned_prefix_is_not_waited_for(self) -> None:
        world = self.prefix_world(20, num_blocks=10)
        world.scheduler.pin(A)
        world.submit(A, sampling=greedy(1))
        while world.scheduler.has_work:
            world.load_all()
            world.step()
        refused = world.submit(BASE, prompt=range(20), sampling=greedy(1))
        world.drain()
        error = world.finishes[refused].error
        assert isinstance(error, PromptTooLong)
        assert "has 4 for it beside 5 that pinned adapters hold" in error.message
        assert "POST /adapters/{name}/unpin" in error.message


class TestFairness:
    def test_more_running_adapters_than_a_step_takes_go_round(self) -> None:
        world = lora_world(max_step_adapters=1, num_slots=4, affinity_age_s=0.0)
        requests = [world.submit(adapter, sampling=greedy(6)) for adapter in (A, B, C)]
        world.load_all()
        for _ in range(12):
            world.step()
        counts = [len(world.tokens[request]) for request in requests]
        assert sum(counts) == 12
        assert max(counts) - min(counts) <= 2
        world.drain()
        world.check_answers()

    def test_a_rank_above_the_budget_runs_alone(self) -> None:
        world = lora_world(max_step_rank=4)
        world.submit(A)
        world.submit(B)
        world.drain()
        assert {len({row.slot for row in step.rows}) for step in world.steps} == {1}
        world.check_answers()

    def test_the_young_are_overtaken_by_the_adapters_of_the_step(self) -> None:
        world = lora_world(max_step_adapters=1, affinity_age_s=1.0, max_step_tokens=30)
        world.submit(A, sampling=greedy(40))
        world.load_all()
        world.step()
        other = world.submit(B, sampling=greedy(1))
        same = world.submit(A, sampling=greedy(1))
        world.load_all()
        world.step()
        assert same in world.finishes
        assert other not in world.finishes
        for _ in range(15):
            world.step()
        assert other in world.finishes, "nobody is overtaken for ever"

    def test_the_overdue_are_not_overtaken_for_what_they_wait_for(self) -> None:
        world = lora_world(num_slots=1, affinity_age_s=1.0)
        world.submit(A, sampling=greedy(30))
        world.load_all()
        world.step()
        other = world.submit(B, sampling=greedy(1))
        world.load_all()
        world.now_s += 2.0
        late = world.submit(A, sampling=greedy(1))
        for _ in range(5):
            world.step()
        assert late not in world.finishes
        world.drain()
        order = list(world.finishes)
        assert order.index(other) < order.index(late)

    def test_rows_beyond_the_token_budget_take_their_turn(self) -> None:
        world = lora_world(max_rows=4, max_step_tokens=2)
        requests = [world.submit(prompt=[i], sampling=greedy(8)) for i in range(4)]
        for _ in range(18):
            world.step()
        counts = [len(world.tokens[request]) for request in requests]
        assert min(counts) >= 3
        world.drain()
        world.check_answers()


class TestPreemption:
    def test_the_youngest_goes_back_and_nothing_is_given_twice(self) -> None:
        world = lora_world(num_blocks=6, max_step_tokens=20)
        old = world.submit(prompt=range(7), sampling=greedy(8, seed=1))
        young = world.submit(prompt=range(7), sampling=greedy(8, seed=2))
        while old not in world.finishes:
            world.step()
            assert world.scheduler.has_work
        assert young not in world.finishes
        assert world.scheduler.snapshot().num_waiting == 1
        assert world.tokens[young], "it had produced tokens before it was preempted"
        world.drain()
        world.check_answers()

    def test_what_can_never_fit_fails(self) -> None:
        world = lora_world(num_blocks=4)
        request = world.submit(prompt=range(13))
        grows = world.submit(prompt=range(10), sampling=greedy(9))
        world.drain()
        error = world.finishes[request].error
        assert isinstance(error, PromptTooLong)
        assert "pin" not in error.message
        assert isinstance(world.finishes[grows].error, PromptTooLong)
        assert len(world.tokens[grows]) == 3
        world.check_answers()

    def test_a_failure_of_plan_is_work_until_it_is_taken(self) -> None:
        world = lora_world(num_blocks=4)
        request = world.submit(prompt=range(13))
        assert world.scheduler.plan() is None
        assert world.scheduler.open_requests() == ()
        assert world.scheduler.has_work
        assert [event.request for event in world.scheduler.take_events()] == [request]
        assert not world.scheduler.has_work


class TestChoices:
    def test_long_choices_are_scored_side_by_side(self) -> None:
        world = lora_world(max_step_tokens=20)
        request = world.submit(prompt=range(6), choices=[(1,), (2, 3), (4, 5, 6)])
        world.drain()
        first, second = world.steps
        assert first.rows[0].wanted == ((1, 2, 4),)
        assert first.rows[0].draw is None
        assert [(row.branch, row.tokens, row.wanted) for row in second.rows] == [
            (2, (2,), ((3,),)),
            (3, (4, 5), ((5,), (6,))),
        ]
        assert [row.start for row in second.rows] == [6, 6]
        assert len(second.copies) == 2
        scores = world.scores[request]
        assert [len(each) for each in scores.token_logprobs] == [1, 2, 3]
        assert scores.logprobs == tuple(sum(each) for each in scores.token_logprobs)
        assert world.finishes[request].reason is FinishReason.EOS
        world.check_answers()

    def test_a_choice_longer_than_a_step_is_scored_in_chunks(self) -> None:
        world = lora_world(max_step_tokens=3)
        world.submit(prompt=[1], choices=[tuple(range(9)), (5, 1)])
        world.drain()
        assert max(step.num_tokens for step in world.steps) == 3
        world.check_answers()

    def test_choices_beyond_the_context_are_refused(self) -> None:
        world = lora_world(max_context=10)
        request = world.submit(prompt=range(6), choices=[(1,), tuple(range(6))])
        fits = world.submit(prompt=range(6), choices=[(1,), tuple(range(5))])
        world.drain()
        assert isinstance(world.finishes[request].error, PromptTooLong)
        assert fits in world.scores


class TestEncoderDecoder:
    def seq2seq_world(self, **changes: object) -> World:
        return World(some_limits(is_encoder_decoder=True, **changes), num_slots=4, max_bytes=100)

    def test_the_source_comes_whole_and_once(self) -> None:
        world = self.seq2seq_world(max_step_tokens=4)
        world.submit(B, prompt=range(10), decoder_prompt=[0, 1], sampling=greedy(3))
        world.drain()
        rows = [step.rows[0] for step in world.steps]
        assert rows[0].source == tuple(range(10))
        assert all(row.source == () for row in rows[1:])
        assert {row.num_source for row in rows} == {world.footprints[B].num_source_tokens + 10}
        assert len({row.cross_blocks for row in rows}) == 1
        world.check_answers()

    def test_one_large_source_a_step(self) -> None:
        world = self.seq2seq_world(max_step_tokens=4)
        for _ in range(3):
            world.submit(BASE, prompt=range(6), sampling=greedy(2))
        world.drain()
        assert all(sum(bool(row.source) for row in step.rows) <= 1 for step in world.steps)
        world.check_answers()

    def test_too_long_a_source_is_refused(self) -> None:
        world = self.seq2seq_world()
        request = world.submit(BASE, prompt=range(45))
        world.drain()
        assert isinstance(world.finishes[request].error, PromptTooLong)


class TestFailures:
    def test_a_step_that_raises_fails_its_rows_and_empties_what_it_installed(self) -> None:
        world = lora_world()
        first = world.submit(A)
        world.load_all()
        world.step(crash="early")
        assert isinstance(world.finishes[first].error, RuntimeError)
        assert world.slots.slot_of(A) is None
        world.submit(B)
        world.drain()
        assert world.steps[1].removes == (1,)
        assert world.loads == [A, B]

    def test_a_request_without_a_row_in_the_step_survives_it(self) -> None:
        world = lora_world(max_step_tokens=2, affinity_age_s=0.0)
        for token in range(2):
            world.submit(prompt=[token], sampling=greedy(9))
        world.step()
        waits = world.submit(A)
        world.load_all()
        world.now_s += 1.0
        world.step(crash="late")
        assert [install.adapter for install in world.steps[-1].installs] == [A]
        assert waits not in {row.request for row in world.steps[-1].rows}
        assert world.scheduler.snapshot().num_waiting == 1
        world.drain()
        assert world.loads == [A, A]
        world.check_answers()

    def test_a_crash_before_the_removes_loses_no_remove(self) -> None:
        world = lora_world(num_slots=1)
        world.submit(A, sampling=greedy(1))
        while world.scheduler.has_work:
            world.load_all()
            world.step()
        assert world.scheduler.evict(A)
        world.submit(BASE, sampling=greedy(1))
        world.step(crash="early")
        assert world.model.slots == {0: BASE, 1: A}
        world.submit(BASE, sampling=greedy(1))
        world.drain()
        assert world.model.slots == {0: BASE}

    def test_a_cancelled_row_is_passed_over(self) -> None:
        world = lora_world()
        request = world.submit(sampling=greedy(9))
        world.step()
        world.step(cancel=request)
        assert len(world.tokens[request]) == 1
        assert world.finishes[request].reason is FinishReason.CANCELLED
        world.check_empty()

    def test_the_unknown_are_not_cancelled(self) -> None:
        world = lora_world()
        request = world.submit()
        world.cancel(request)
        world.cancel(request)
        assert list(world.finishes) == [request]

    def test_steps_and_results_come_in_turn(self) -> None:
        world = lora_world()
        world.submit()
        step = world.scheduler.plan()
        assert step is not None
        with pytest.raises(AssertionError, match="under way"):
            world.scheduler.plan()
        with pytest.raises(AssertionError, match="under way, not 7"):
            world.scheduler.commit(StepResult(step_id=7, rows=()))


class TestAdmission:
    def test_the_queue_is_bounded(self) -> None:
        world = lora_world(max_queue=2)
        world.submit()
        world.submit()
        with pytest.raises(QueueFull) as caught:
            world.submit()
        assert caught.value.retry_after_s is not None
        assert caught.value.retry_after_s >= 1.0
        del world.requests[next(reversed(world.requests))]
        world.drain()

    def test_retry_after_follows_the_rate_of_finishes(self) -> None:
        world = lora_world(max_queue=50, max_rows=1)
        for _ in range(50):
            world.submit(sampling=greedy(1))
        for _ in range(20):
            world.now_s += 0.9
            world.step()
        while world.scheduler.snapshot().num_waiting < 50:
            world.submit(sampling=greedy(1))
        with pytest.raises(QueueFull) as caught:
            world.submit(sampling=greedy(1))
        assert caught.value.retry_after_s == pytest.approx(50 * 19 / 20, abs=2.0)

    def test_ids_are_unique(self) -> None:
        world = lora_world()
        request = world.submit()
        with pytest.raises(ValueError, match="unique"):
            world.scheduler.submit(world.requests[request])

    @pytest.mark.parametrize(
        ("fields", "rule"),
        [
            ({"prompt": ()}, "no tokens to start from"),
            ({"choices": [(1,), ()]}, "a choice without tokens"),
            ({"sampling": SamplingParams(max_new_tokens=0)}, "max_new_tokens"),
            ({"sampling": SamplingParams(do_sample=True)}, "without a seed"),
        ],
    )
    def test_a_request_no_step_could_serve_is_refused(self, fields: dict[str, object], rule: str) -> None:
        world = lora_world()
        with pytest.raises(ValueError, match=rule):
            world.submit(**fields)  # type: ignore[arg-type]
        assert not world.scheduler.has_work

    @pytest.mark.parametrize("name", ["max_rows", "max_step_tokens", "max_queue", "block_size", "max_loads"])
    def test_limits_are_positive(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name} is 0"):
            some_limits(**{name: 0})

    def test_cross_blocks_go_with_the_base(self) -> None:
        blocks = BlockLedger(num_blocks=4, block_size=4)
        slots = SlotLedger(num_slots=1, max_bytes=1)
        with pytest.raises(ValueError, match="cross_blocks"):
            Scheduler(some_limits(is_encoder_decoder=True), slots, blocks, None, lambda: 0.0)


def test_a_snapshot_counts() -> None:
    world = lora_world()
    world.submit(A, sampling=greedy(5))
    world.submit(B)
    world.submit(BASE)
    world.ask()
    world.finish_load(A)
    world.step()
    seen = world.scheduler.snapshot()
    assert (seen.num_waiting, seen.num_loading, seen.num_running) == (1, 1, 2)
    assert (seen.waiting_adapters, set(seen.running_adapters)) == ((B,), {A, BASE})
    assert [(r.adapter, r.slot, r.num_bytes, r.num_leases) for r in seen.resident] == [(A, 1, 10, 1)]
    assert (seen.device_bytes, seen.num_slots, seen.num_blocks) == (10, 2, 59)
    assert seen.num_free_blocks == 57
    assert seen.kv_usage == pytest.approx(2 / 59)
