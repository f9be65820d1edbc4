"""The sampler against transformers' own processors, against itself in other batches, and against chance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import logits_process as hf

from peft_serve.core import Draw, SamplingParams
from peft_serve.model.sampler import Chosen, best_ids, edited, uniform, warped
from tests.model.at_once import choose, score

VOCAB = 40


def logits(num_rows: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def draw(params: SamplingParams | None = None, *, seed: int = 7, index: int = 0, **rest: tuple[int, ...]) -> Draw:
    return Draw(params=params or SamplingParams(), seed=seed, index=index, **rest)


def sampling(**fields: float) -> SamplingParams:
    return SamplingParams(do_sample=True, **fields)  # type: ignore[arg-type]


def tokens(chosen: list[Chosen]) -> list[int]:
    return [c.token for c in chosen]


# --- greedy -----------------------------------------------------------------------------------------------


def test_greedy_is_argmax_and_ties_go_to_the_lowest_id() -> None:
    scores = torch.zeros(3, VOCAB)
    scores[0, [5, 9]] = 2.0
    scores[1, 30] = 1.0
    assert tokens(choose(scores, [draw()] * 3)) == [5, 30, 0]


def test_no_rows() -> None:
    assert choose(torch.empty(0, VOCAB), []) == []
    assert score(torch.empty(0, VOCAB), []) == []


@pytest.mark.parametrize("size", [16384, 16385, 20000, 50257])
def test_the_best_of_a_large_vocabulary_is_argmax(size: int) -> None:
    x = torch.randn(7, size, generator=torch.Generator().manual_seed(size))
    x[0, [size - 1, 300, 301, 9000]] = 50.0  # equals, in one part and in others
    x[1, size - 1] = 50.0
    x[2, :] = -math.inf
    x[3, :] = -math.inf
    x[3, size - 2] = 0.0
    x[4, 12345] = math.nan
    x[5, 127:129] = 50.0
    assert best_ids(x).tolist() == x.argmax(-1).tolist()
    assert best_ids(x)[0] == 300


def test_temperature_zero_is_greedy() -> None:
    x = logits(4)
    zero = draw(sampling(temperature=0.0))
    assert tokens(choose(x, [zero] * 4)) == x.argmax(-1).tolist()


def test_suppressed_ids_are_never_chosen() -> None:
    x = logits(2)
    best = x[0].argmax().item()
    chosen = choose(x, [draw(suppress=(int(best), 10**9)), draw()])
    assert chosen[0].token == x[0].topk(2).indices[1]
    assert chosen[1].token == x[1].argmax()


def test_the_logits_are_left_as_they_were() -> None:
    x = logits(3)
    before = x.clone()
    penalised = SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0)
    sampled = sampling(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, typical_p=0.5)
    choose(x, [draw(penalised, prompt_history=(1, 2), output_history=(3,)), draw(sampled), draw()])
    assert torch.equal(x, before)


# --- penalties --------------------------------------------------------------------------------------------


@given(penalty=st.floats(0.3, 3.0), history=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12))
@settings(max_examples=30, deadline=None)
def test_repetition_penalty_is_transformers(penalty: float, history: list[int]) -> None:
    x = logits(1, seed=len(history))
    want = hf.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([history]), x.clone())
    half = len(history) // 2
    params = SamplingParams(repetition_penalty=penalty)
    got = edited(x, [draw(params, prompt_history=tuple(history[:half]), output_history=tuple(history[half:]))])
    torch.testing.assert_close(got, want)


def test_frequency_and_presence_count_the_output_only() -> None:
    x = logits(2)
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)
    got = edited(x, [draw(params, prompt_history=(1,), output_history=(2, 2, 3)), draw()])
    want = x.clone()
    want[0, 2] -= 0.5 * 2 + 0.25
    want[0, 3] -= 0.5 + 0.25
    torch.testing.assert_close(got, want)


def test_greedy_with_penalty_equals_generate() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=VOCAB,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    prompt = [3, 8, 8, 21]
    plan = GenerationConfig(max_new_tokens=12, repetition_penalty=1.7, do_sample=False, pad_token_id=0)
    want = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 4, dtype=torch.long), generation_config=plan
    )[0, 4:].tolist()
    out: list[int] = []
    params = SamplingParams(repetition_penalty=1.7)
    for index in range(12):
        with torch.inference_mode():
            last = model(torch.tensor([prompt + out])).logits[:, -1]
        here = draw(params, index=index, prompt_history=tuple(prompt), output_history=tuple(out))
        out += tokens(choose(last, [here]))
    assert out == want


# --- warpers ----------------------------------------------------------------------------------------------


def by_transformers(x: Tensor, params: SamplingParams) -> Tensor:
    """The warpers in the order of GenerationMixin._get_logits_processor."""
    steps: list[hf.LogitsProcessor] = []
    if params.temperature != 1:
        steps.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(hf.MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        steps.append(hf.TypicalLogitsWarper(params.typical_p))
    for step in steps:
        x = step(torch.zeros(1, 1, dtype=torch.long), x)
    return x


warpers = st.builds(
    sampling,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 39, 40, 1000]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    typical_p=st.sampled_from([0.2, 0.9, 1.0]),
)


@given(rows=st.lists(warpers, min_size=1, max_size=6), seed=st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_warpers_are_transformers(rows: list[SamplingParams], seed: int) -> None:
    x = logits(len(rows), seed)
    got = warped(x, rows)
    want = torch.cat([by_transformers(x[i : i + 1].clone(), p) for i, p in enumerate(rows)])
    torch.testing.assert_close(got, want)


def test_top_k_keeps_ties_and_top_p_keeps_one() -> None:
    x = torch.zeros(1, VOCAB)
    x[0, [4, 7]] = 5.0
    assert torch.isfinite(warped(x, [sampling(top_k=1)])).nonzero()[:, 1].tolist() == [4, 7]
    assert int(torch.isfinite(warped(x, [sampling(top_p=1e-9)])).sum()) == 1


# --- chance -----------------------------------------------------------------------------------------------


def test_uniform_is_in_range_and_has_no_visible_pattern() -> None:
    values = [uniform(seed, index) for seed in range(-5, 95) for index in range(100)]
    assert all(0 <= v < 1 for v in values)
    assert len(set(values)) == len(values)
    counts = torch.histc(torch.tensor(values), bins=20, min=0, max=1)
    assert float(((counts - 500) ** 2 / 500).sum()) < 43.8  # chi-square, 19 degrees, p = 0.001
    lagged = torch.tensor(values).view(100, 100)
    correlation = torch.corrcoef(torch.stack([lagged[:, :-1].flatten(), lagged[:, 1:].flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.03


@given(
    seed=st.integers(0, 2**64 - 1),
    index=st.integers(0, 5000),
    others=st.lists(warpers, max_size=5),
    place=st.integers(0, 5),
    own=warpers,
)
@settings(max_examples=50, deadline=None)
def test_a_draw_does_not_depend_on_its_neighbours(
    seed: int, index: int, others: list[SamplingParams], place: int, own: SamplingParams
) -> None:
    row = logits(1, seed=3)
    mine = draw(own, seed=seed, index=index)
    alone = choose(row, [mine])
    place = min(place, len(others))
    rest = logits(len(others), seed=4)
    crowd = torch.cat([rest[:place], row, rest[place:]])
    draws = [draw(p, seed=i) for i, p in enumerate(others)]
    draws.insert(place, mine)
    assert choose(crowd, draws)[place] == alone[0]


@pytest.mark.parametrize(
    "params", [sampling(), sampling(temperature=0.7, top_k=10), sampling(top_p=0.8), sampling(typical_p=0.7)]
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    num_draws = 4000
    x = logits(1, seed=11, spread=1.0)
    draws = [draw(params, seed=99, index=i) for i in range(num_draws)]
    chosen = torch.tensor(tokens(choose(x.expand(num_draws, -1), draws)))
    probs = warped(x, [params]).softmax(-1)[0].double()
    counts = torch.bincount(chosen, minlength=VOCAB).double()
    assert counts[probs == 0].sum() == 0
    expected = probs[probs > 0] * num_draws
    statistic = float(((counts[probs > 0] - expected) ** 2 / expected).sum())
    degrees = len(expected) - 1
    assert statistic < degrees + 3.5 * math.sqrt(2 * degrees) + 4


def test_different_seeds_and_indices_differ() -> None:
    x = logits(1, spread=0.1).expand(64, -1)
    by_seed = tokens(choose(x, [draw(sampling(), seed=s) for s in range(64)]))
    by_index = tokens(choose(x, [draw(sampling(), index=i) for i in range(64)]))
    assert len(set(by_seed)) > 15
    assert len(set(by_index)) > 15


# --- reports ----------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits() -> None:
    x = logits(3)
    params = sampling(temperature=0.2, top_k=2, logprobs=True, num_top_logprobs=4)
    chosen = choose(x, [draw(params), draw(), draw(SamplingParams(num_top_logprobs=2))])
    log = x.log_softmax(-1)
    assert chosen[0].logprob == pytest.approx(float(log[0, chosen[0].token]))
    best = log[0].topk(4)
    assert [i for i, _ in chosen[0].top] == best.indices.tolist()
    assert [v for _, v in chosen[0].top] == pytest.approx(best.values.tolist())
    assert chosen[1].logprob is None
    assert chosen[1].top == ()
    assert chosen[2].logprob is None
    assert len(chosen[2].top) == 2


def test_top_logprobs_put_the_lowest_id_first_among_equals() -> None:
    x = torch.zeros(1, VOCAB)
    x[0, 20] = 1.0
    (chosen,) = choose(x, [draw(SamplingParams(num_top_logprobs=4))])
    assert [i for i, _ in chosen.top] == [20, 0, 1, 2]
    (all_of_them,) = choose(x, [draw(SamplingParams(num_top_logprobs=999))])
    assert len(all_of_them.top) == VOCAB


def test_score_reads_each_row_at_its_ids() -> None:
    x = logits(4)
    got = score(x, [(1, 2, 1), (), (39,), ()])
    log = x.log_softmax(-1)
    assert [len(g) for g in got] == [3, 0, 1, 0]
    assert got[0] == pytest.approx(log[0, [1, 2, 1]].tolist(), abs=1e-5)
    assert got[2] == pytest.approx([float(log[2, 39])], abs=1e-5)


def test_half_precision_logits_are_computed_in_float() -> None:
    x = logits(2).bfloat16()
    params = sampling(top_p=0.9, logprobs=True)
    chosen = choose(x, [draw(params), draw(SamplingParams(logprobs=True))])
    again = choose(x.float(), [draw(params), draw(SamplingParams(logprobs=True))])
    assert chosen == again


def test_a_forced_token_wins_over_everything() -> None:
    logits_NV = torch.tensor([[0.0, 5.0, 1.0], [9.0, 0.0, 0.0]])
    draws = [
        Draw(params=SamplingParams(), seed=0, index=0, forced=2, suppress=(2,)),
        Draw(params=SamplingParams(), seed=0, index=0),
    ]
    assert [chosen.token for chosen in choose(logits_NV, draws)] == [2, 0]
