"""Every request gets exactly what it would get alone, whatever happens around it."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from peft_serve.core import BASE, AdapterId, FinishReason, Reading, RequestId, SamplingParams
from peft_serve.errors import AdapterUnavailable
from tests.scheduling.fake_constraint import Path
from tests.scheduling.world import EOS, World, adapter_id, some_footprints, some_limits

NUM_ADAPTERS = 7


def random_request(world: World, rng: random.Random, *, num_adapters: int = NUM_ADAPTERS) -> RequestId:
    """A request of any kind; one in four scores choices, and one in four reads where that is possible."""
    adapter = BASE if rng.random() < 0.2 else adapter_id(rng.randrange(num_adapters))
    longest = 30 if rng.random() < 0.1 else 9
    prompt = [rng.randrange(11) for _ in range(rng.randint(1, longest))]
    start = [rng.randrange(11) for _ in range(rng.randint(1, 3))]
    can_read = not world.limits.is_encoder_decoder
    if world.limits.is_encoder or (can_read and rng.random() < 0.25):
        segments = [rng.randrange(2) for _ in prompt] if rng.random() < 0.5 else []
        return world.submit(adapter, prompt, reading=rng.choice(list(Reading)), segments=segments)
    if rng.random() < 0.25:
        choices = [[rng.randrange(11) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(1, 5))]
        return world.submit(adapter, prompt, decoder_prompt=start, choices=choices)
    prompt_logprobs = rng.choice((0, 2)) if rng.random() < 0.2 else None
    if rng.random() < 0.3 and world.limits.max_rows > 1:
        sampling = random_search(rng, most=world.limits.max_rows)
        return world.submit(adapter, prompt, decoder_prompt=start, sampling=sampling, prompt_logprobs=prompt_logprobs)
    sampling = SamplingParams(
        max_new_tokens=rng.randint(1 if prompt_logprobs is None else 0, 12),
        min_new_tokens=rng.choice((0, 0, 4)),
        do_sample=rng.random() < 0.5,
        repetition_penalty=rng.choice((1.0, 1.2)),
        seed=rng.randrange(1000),
        ignore_eos=rng.random() < 0.3,
    )
    return world.submit(
        adapter,
        prompt,
        decoder_prompt=start,
        sampling=sampling,
        prompt_logprobs=prompt_logprobs,
        constraint=random_path(rng, sampling) if rng.random() < 0.4 else None,
    )


def random_path(rng: random.Random, sampling: SamplingParams) -> Path:
    """A constraint; one in five breaks on its way."""
    return Path(
        seed=rng.randrange(1000),
        length=rng.randint(1, 8),
        eos_ids=frozenset() if sampling.ignore_eos else frozenset({EOS}),
        breaks_at=rng.randrange(6) if rng.random() < 0.2 else None,
    )


def random_search(rng: random.Random, *, most: int) -> SamplingParams:
    """A beam search of at most so many beams."""
    num_beams = rng.randint(2, min(most, 4))
    return SamplingParams(
        max_new_tokens=rng.randint(1, 10),
        min_new_tokens=rng.choice((0, 0, 3)),
        repetition_penalty=rng.choice((1.0, 1.2)),
        ignore_eos=rng.random() < 0.2,
        num_beams=num_beams,
        num_sequences=rng.randint(1, num_beams),
        length_penalty=rng.choice((-1.0, 0.0, 1.0, 2.0)),
        early_stopping=rng.choice((False, True, "never")),
    )


KINDS = ("decoder-only", "encoder-decoder", "encoder")


def random_world(rng: random.Random, kind: str, *, num_adapters: int = NUM_ADAPTERS) -> World:
    is_encoder_decoder, is_encoder = kind == "encoder-decoder", kind == "encoder"
    limits = some_limits(
        max_rows=rng.randint(1, 6),
        max_step_tokens=rng.randint(2, 20),
        max_step_adapters=rng.randint(1, 3),
        max_step_rank=rng.choice((8, 24, 64)),
        block_size=rng.choice((1, 3, 4)),
        max_context=rng.choice((24, 40)),
        is_encoder_decoder=is_encoder_decoder,
        is_encoder=is_encoder,
        affinity_age_s=rng.choice((0.0, 0.3, 5.0)),
        max_loads=rng.randint(1, 4),
    )
    return World(
        limits,
        footprints=some_footprints(num_adapters, is_encoder_decoder=is_encoder_decoder, is_encoder=is_encoder),
        num_slots=rng.randint(1, 4),
        max_bytes=rng.choice((20, 45, 100)),
        num_blocks=rng.randint(6, 30),
        num_cross_blocks=rng.randint(4, 24),
    )


def act(world: World, rng: random.Random) -> None:
    """Anything that can happen to a scheduler."""
    draw = rng.random()
    victim = rng.choice(list(world.requests)) if world.requests and rng.random() < 0.1 else None
    if draw < 0.25:
        random_request(world, rng)
    elif draw < 0.35:
        world.ask()
    elif draw < 0.5 and world.loading:
        error = AdapterUnavailable("corrupt") if rng.random() < 0.1 else None
        world.finish_load(rng.choice(world.loading), error=error)
    elif draw < 0.53:
        world.scheduler.evict(adapter_id(rng.randrange(NUM_ADAPTERS)))
        world.scheduler.check()
    elif draw < 0.56 and victim is not None:
        world.cancel(victim)
    else:
        broken = adapter_id(rng.randrange(NUM_ADAPTERS)) if rng.random() < 0.03 else None
        world.step(broken=broken, crash=rng.choice(("early", "late")) if rng.random() < 0.04 else "", cancel=victim)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(60))
def test_everyone_gets_what_they_get_alone(seed: int, kind: str) -> None:
    rng = random.Random(seed)
    world = random_world(rng, kind)
    for _ in range(150):
        act(world, rng)
    world.drain()
    world.check_answers()


class SchedulerMachine(RuleBasedStateMachine):
    """The same, with hypothesis choosing and shrinking the acts."""

    world: World

    @initialize(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS))
    def start(self, seed: int, kind: str) -> None:
        self.world = random_world(random.Random(seed), kind)

    @rule(seed=st.integers(0, 10_000))
    def submit(self, seed: int) -> None:
        random_request(self.world, random.Random(seed))

    @rule()
    def ask(self) -> None:
        self.world.ask()

    @precondition(lambda self: self.world.loading)
    @rule(data=st.data(), works=st.booleans())
    def finish_load(self, data: st.DataObject, works: bool) -> None:
        adapter = data.draw(st.sampled_from(self.world.loading))
        self.world.finish_load(adapter, error=None if works else AdapterUnavailable("corrupt"))

    @precondition(lambda self: self.world.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.world.cancel(data.draw(st.sampled_from(sorted(self.world.requests))))

    @rule(index=st.integers(0, NUM_ADAPTERS - 1))
    def evict(self, index: int) -> None:
        self.world.scheduler.evict(adapter_id(index))

    @rule()
    def step(self) -> None:
        self.world.step()

    @rule(index=st.integers(0, NUM_ADAPTERS - 1))
    def step_with_a_broken_adapter(self, index: int) -> None:
        self.world.step(broken=adapter_id(index))

    @rule(crash=st.sampled_from(["early", "late"]))
    def step_that_crashes(self, crash: str) -> None:
        self.world.step(crash=crash)

    @precondition(lambda self: self.world.requests)
    @rule(data=st.data())
    def cancel_during_a_step(self, data: st.DataObject) -> None:
        self.world.step(cancel=data.draw(st.sampled_from(sorted(self.world.requests))))

    @rule(seconds=st.floats(0.0, 3.0))
    def wait(self, seconds: float) -> None:
        self.world.now_s += seconds

    @invariant()
    def books_are_consistent(self) -> None:
        if hasattr(self, "world"):
            self.world.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()
            self.world.check_answers()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_two_thousand_adapters_over_eight_slots() -> None:
    rng = random.Random(8)
    footprints = some_footprints(2000)
    limits = some_limits(max_rows=16, max_step_tokens=64, max_step_adapters=6, max_step_rank=200, max_loads=12)
    world = World(limits, footprints=footprints, num_slots=8, max_bytes=200, num_blocks=120)
    asked: set[AdapterId] = set()
    for adapter in footprints:
        world.submit(adapter, [rng.randrange(11)], sampling=SamplingParams(max_new_tokens=2, seed=1))
        asked.add(adapter)
        if rng.random() < 0.5:
            world.load_all()
            world.step()
        if world.scheduler.snapshot().num_waiting > 100:
            while world.scheduler.snapshot().num_waiting > 50:
                world.load_all()
                world.step()
    assert set(world.loads) <= asked - {BASE}
    world.drain()
    world.check_answers()
    assert set(world.loads) == asked - {BASE}
    assert all(finish.reason is not FinishReason.FAILED for finish in world.finishes.values())
