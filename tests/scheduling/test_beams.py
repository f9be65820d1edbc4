"""Beam search: the books against transformers' own `generate`, and searches among other requests."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from peft_serve.core import BASE, Candidate, FinishReason, Footprint, SamplingParams
from peft_serve.errors import Internal, PromptTooLong
from peft_serve.scheduling.beams import BeamSearch, Given
from peft_serve.scheduling.draft import MAX_SCORED
from tests.scheduling.fake_model import FakeModel
from tests.scheduling.world import World, adapter_id, some_limits

VOCABULARY = 30


class Bigrams(PreTrainedModel, GenerationMixin):
    """Says what it says by the last two tokens alone."""

    config_class = PreTrainedConfig

    def __init__(self, table_VVV: torch.Tensor) -> None:
        super().__init__(PreTrainedConfig(vocab_size=VOCABULARY, is_encoder_decoder=False))
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.table_VVV = table_VVV

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.table_VVV[input_ids[:, -2], input_ids[:, -1]].unsqueeze(1))

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}


def by_transformers(
    table: torch.Tensor, eos_ids: list[int], max_new: int, rules: dict[str, Any]
) -> list[tuple[list[int], float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Bigrams(table).generate(
            torch.tensor([[4, 5]]),
            attention_mask=torch.ones(1, 2, dtype=torch.long),
            generation_config=GenerationConfig(
                max_new_tokens=max_new,
                eos_token_id=eos_ids,
                pad_token_id=0,
                do_sample=False,
                use_cache=False,
                num_return_sequences=rules["num_beams"],
                return_dict_in_generate=True,
                output_scores=True,
                **rules,
            ),
        )
    found = []
    for row, score in zip(made.sequences.tolist(), made.sequences_scores.tolist(), strict=True):
        new = row[2:]
        end = next((i + 1 for i, token in enumerate(new) if token in eos_ids), len(new))
        found.append((new[:end], score))
    return found


def by_us(table: torch.Tensor, eos_ids: list[int], max_new: int, rules: dict[str, Any]) -> BeamSearch:
    search = BeamSearch(eos_ids=frozenset(eos_ids), max_new_tokens=max_new, **rules)
    while not search.is_over:
        given = []
        for beam in search.running:
            before = [4, 5, *beam.tokens]
            logprobs = table[before[-2], before[-1]].log_softmax(-1)
            best = logprobs.topk(search.num_candidates)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            given.append(Given(tuple(Candidate(i, p, p) for i, p in pairs)))
        search.advance(given)
    return search


@pytest.mark.parametrize("seed", range(60))
def test_a_search_finds_what_transformers_finds(seed: int) -> None:
    rng = random.Random(seed)
    table = torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    eos_ids = rng.sample(range(6, VOCABULARY), rng.randint(1, 3))
    table[:, :, eos_ids] += rng.choice((0.0, 1.0, 2.0))
    rules = {
        "num_beams": rng.randint(2, 6),
        "length_penalty": rng.choice((-1.0, 0.0, 0.5, 1.0, 2.5)),
        "early_stopping": rng.choice((False, True, "never")),
    }
    max_new = rng.choice((1, 2, 6, 15))
    expected = by_transformers(table, eos_ids, max_new, rules)
    found = by_us(table, eos_ids, max_new, rules).best(rules["num_beams"])
    assert [list(each.tokens) for each in found] == [tokens for tokens, _ in expected]
    assert [each.score for each in found] == pytest.approx([score for _, score in expected], rel=1e-4)
    assert [each.is_ended for each in found] == [tokens[-1] in eos_ids for tokens, _ in expected]
    assert all(len(each.logprobs) == len(each.tops) == len(each.tokens) for each in found)


def test_what_cannot_come_is_no_candidate() -> None:
    search = BeamSearch(num_beams=2, eos_ids=frozenset({1}), max_new_tokens=3)
    search.advance([Given((Candidate(7, 0.0, -3.0), Candidate(8, float("-inf"), -1.0)))])
    assert [beam.tokens for beam in search.running] == [(7,)]
    search.advance([Given((Candidate(9, float("nan"), 0.0),))])
    assert search.is_over
    assert search.best(2) == ()


def beams(num_beams: int = 3, **changes: Any) -> SamplingParams:
    defaults: dict[str, Any] = {"max_new_tokens": 6, "num_sequences": num_beams, "ignore_eos": True}
    return SamplingParams(num_beams=num_beams, **(defaults | changes))


def test_every_beam_counts_as_a_row() -> None:
    world = World(some_limits(max_rows=4, max_step_tokens=20))
    for sampling in (beams(3), beams(2), SamplingParams(max_new_tokens=8, seed=1, ignore_eos=True)):
        world.submit(prompt=(1, 2), sampling=sampling)
    world.step()
    assert {row.request for row in world.steps[-1].rows} == {"r0", "r2"}, "a second search has to wait for its rows"
    world.step()
    assert sorted(row.branch for row in world.steps[-1].rows if row.request == "r0") == [1, 2, 3]
    world.drain()
    world.check_answers()
    with pytest.raises(ValueError, match="at most 4"):
        world.submit(sampling=beams(5))


def test_beams_share_the_blocks_of_their_prompt_and_past() -> None:
    world = World(some_limits(max_rows=4, max_step_tokens=40, max_context=40), num_blocks=40)
    world.submit(prompt=range(9), sampling=beams(4, max_new_tokens=12))
    most = 0
    while world.step():
        most = max(most, world.blocks.capacity - world.blocks.num_free)
    assert most < 3 + 4 * 4, "the prompt's two full blocks are held once"
    world.check_answers()


def test_a_search_that_cannot_fit_is_refused_at_once() -> None:
    """Not when its beams have drifted apart: how much they share is not known before."""
    world = World(some_limits(), num_blocks=8)
    request = world.submit(prompt=(1, 2, 3), sampling=beams(3, max_new_tokens=12))
    world.drain()
    assert isinstance(world.finishes[request].error, PromptTooLong)


def test_a_preempted_search_finds_the_same() -> None:
    world = World(some_limits(max_rows=8, max_step_tokens=30), num_blocks=14)
    old = world.submit(prompt=range(14), sampling=SamplingParams(max_new_tokens=25, seed=1, ignore_eos=True))
    world.step()
    young = world.submit(prompt=(5, 6), sampling=beams(3, max_new_tokens=14))
    world.drain()
    world.check_answers()
    prefills = [row for step in world.steps for row in step.rows if row.request == young and row.start == 0]
    assert len(prefills) > 1, "it was preempted"
    assert not any(row.draw for row in prefills[1:]), "it goes on where it was"
    assert world.finishes[old].reason is FinishReason.LENGTH


def test_a_search_without_numbers_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(some_limits(max_step_tokens=20))
    lost = world.submit(prompt=(1, 2), sampling=beams(2))
    sound = world.submit(prompt=(1, 2))
    run = FakeModel.run

    def without_numbers(self: FakeModel, step: Any, **options: Any) -> Any:
        result = run(self, step, **options)
        for row in result.rows:
            object.__setattr__(row, "candidates", tuple(Candidate(1, float("nan"), 0.0) for _ in row.candidates))
        return result

    monkeypatch.setattr(FakeModel, "run", without_numbers)
    world.drain()
    assert isinstance(world.finishes[lost].error, Internal)
    world.check_answer(sound)


def test_an_answer_ends_with_the_token_that_comes_after_its_time() -> None:
    world = World()  # a step takes a tenth of a second
    plain = SamplingParams(max_new_tokens=30, seed=7, ignore_eos=True)
    one = world.submit(prompt=(1, 2), sampling=plain, max_time_s=0.25)
    search = world.submit(prompt=(1, 2), sampling=beams(2, max_new_tokens=30), max_time_s=0.25)
    other = world.submit(prompt=(1, 2), sampling=plain)
    world.drain()
    assert world.finishes[one].reason is world.finishes[search].reason is FinishReason.LENGTH
    assert world.last_tokens[one].is_last, "a stream knows its last piece"
    assert 1 <= len(world.tokens[one]) < 6
    assert 1 <= len(world.beams[search].continuations[0].tokens) < 6
    assert world.tokens[other][: len(world.tokens[one])] == world.tokens[one]
    world.check_answer(other)


def test_a_prompts_log_probabilities_come_in_pieces_and_past_the_prefix_cache() -> None:
    world = World(some_limits(max_rows=2, max_step_tokens=300, max_context=700), num_blocks=400)
    prompt = [i % 11 for i in range(300)]
    world.submit(prompt=prompt)
    world.drain_requests()
    asked = world.submit(prompt=prompt, prompt_logprobs=2)
    world.drain_requests()
    sizes = [len(row.wanted) for step in world.steps for row in step.rows if row.request == asked]
    assert sizes[:2] == [MAX_SCORED, 300 - MAX_SCORED]
    assert world.finishes[asked].num_cached_tokens == 0
    silent = world.submit(prompt=prompt[:5], sampling=SamplingParams(max_new_tokens=0), prompt_logprobs=0)
    world.drain()
    assert (world.finishes[silent].reason, world.tokens[silent]) == (FinishReason.LENGTH, [])
    world.check_answers()


@pytest.mark.parametrize("num_prefix", [0, 3])
def test_beams_stand_behind_an_adapters_prefix_and_its_activation(num_prefix: int) -> None:
    adapter = adapter_id(1)
    footprint = Footprint(num_bytes=10, max_rank=8, num_prefix_tokens=num_prefix, start=(6, 7))
    world = World(some_limits(max_step_tokens=20), footprints={BASE: Footprint(num_bytes=0), adapter: footprint})
    for prompt in ((1, 6, 7, 2, 3), (1, 2, 3)):
        world.submit(adapter, prompt, sampling=beams(3))
        world.submit(BASE, prompt, sampling=beams(2))
    world.drain()
    world.check_answers()
