"""Popularity, arrivals, lengths and traces: the statistics they promise, with fixed seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loadtest.arrivals import arrival_times
from loadtest.lengths import Lengths, parse_lengths
from loadtest.popularity import parse_popularity, zipf_weights
from loadtest.prompts import words
from loadtest.trace import BASE, Trace, TraceSpec, build_trace

COUNT = 20_000


def shares(name: str, num_adapters: int, arrivals_s: np.ndarray | None = None) -> np.ndarray:
    times = np.zeros(COUNT) if arrivals_s is None else arrivals_s
    chosen = parse_popularity(name).choose(times, num_adapters, np.random.default_rng(7))
    assert chosen.min() >= 0
    assert chosen.max() < num_adapters
    return np.bincount(chosen, minlength=num_adapters) / len(times)


def test_slora_with_alpha_one_is_uniform() -> None:
    assert shares("slora:1", 10) == pytest.approx(np.full(10, 0.1), abs=0.01)


@pytest.mark.parametrize("alpha", [0.1, 0.3, 2.0])
def test_slora_follows_its_formula(alpha: float) -> None:
    edges = np.arange(11) / 10  # P(i <= k) = P(U < ((k + 1) / n)^alpha)
    assert shares(f"slora:{alpha}", 10) == pytest.approx(np.diff(edges**alpha), abs=0.015)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_zipf_weights_fall_with_the_rank(exponent: float) -> None:
    weights = zipf_weights(20, exponent)
    assert shares(f"zipf:{exponent}", 20) == pytest.approx(weights / weights.sum(), abs=0.012)


def test_distinct_repeats_no_adapter_within_a_round() -> None:
    chosen = parse_popularity("distinct").choose(np.zeros(24), 8, np.random.default_rng(0))
    assert all(len(set(chosen[start : start + 8])) == 8 for start in range(17))


@pytest.mark.parametrize(("num_adapters", "num_used"), [(1, 1), (4, 2), (5, 3), (9, 3), (32, 6)])
def test_uniform_uses_the_square_root_rounded_up(num_adapters: int, num_used: int) -> None:
    found = shares("uniform", num_adapters)
    assert np.count_nonzero(found) == num_used
    assert found[:num_used] == pytest.approx(np.full(num_used, 1 / num_used), abs=0.015)


def test_skewed_falls_by_half_again() -> None:
    found = shares("skewed", 32)
    assert found[:4] / found[1:5] == pytest.approx(np.full(4, 1.5), rel=0.1)


def test_identical_uses_one() -> None:
    assert shares("identical", 5).tolist() == [1, 0, 0, 0, 0]


def test_drift_turns_its_ranking_every_period() -> None:
    assert int(shares("drift", 16, np.full(COUNT, 19.9)).argmax()) == 0
    assert int(shares("drift", 16, np.full(COUNT, 20.1)).argmax()) == 2
    assert int(shares("drift:5", 16, np.full(COUNT, 20.1)).argmax()) == 8


def test_unknown_popularity_says_what_is_known() -> None:
    with pytest.raises(ValueError, match="zipf:1"):
        parse_popularity("pareto")


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_variation_asked_for(cv: float) -> None:
    times = arrival_times(rate_per_s=50.0, cv=cv, duration_s=2000.0, rng=np.random.default_rng(3))
    gaps = np.diff(times)
    assert np.all(gaps >= 0)
    assert times[-1] < 2000.0
    assert 1 / gaps.mean() == pytest.approx(50.0, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_a_low_rate_may_bring_nobody() -> None:
    assert arrival_times(rate_per_s=1e-6, cv=1.0, duration_s=1.0, rng=np.random.default_rng(0)).size == 0


def test_lengths_by_name_and_by_range() -> None:
    assert parse_lengths("cpu") == Lengths(prompt_min=1, prompt_max=64, answer_min=1, answer_max=64)
    assert parse_lengths("gpu").mean_answer == 260
    prompts, answers = parse_lengths("3-5,7-7").draw(1000, np.random.default_rng(0))
    assert set(prompts) == {3, 4, 5}
    assert set(answers) == {7}


@pytest.mark.parametrize("text", ["tpu", "5-3,1-2", "0-1,1-1", "1-2"])
def test_bad_lengths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="lengths"):
        parse_lengths(text)


SPEC = TraceSpec(adapters=("a", "b", "c"), lengths=parse_lengths("2-9,1-4"), rate_per_s=20.0, duration_s=5.0, seed=11)


def test_a_trace_is_the_same_again_and_survives_its_file(tmp_path: Path) -> None:
    trace = build_trace(SPEC)
    assert trace == build_trace(SPEC)
    assert trace.requests != build_trace(replace(SPEC, seed=12)).requests
    trace.save(tmp_path / "deep" / "trace.json")
    again = Trace.load(tmp_path / "deep" / "trace.json")
    assert again.requests == trace.requests
    assert again.adapters == ["a", "b", "c"]


def test_other_adapters_leave_arrivals_lengths_and_prompts_alone() -> None:
    many, none = build_trace(SPEC), build_trace(replace(SPEC, adapters=(), popularity="zipf:1"))
    assert {request.adapter for request in none.requests} == {BASE}
    assert [replace(request, adapter=BASE) for request in many.requests] == list(none.requests)


def test_prompts_have_as_many_words_as_tokens() -> None:
    known = set(words())
    for request in build_trace(SPEC).requests:
        assert len(request.text.split()) == request.prompt_tokens
        assert set(request.text.split()) <= known


def test_a_closed_loop_trace_has_a_number_and_no_times() -> None:
    trace = build_trace(replace(SPEC, duration_s=None, num_requests=30))
    assert len(trace.requests) == 30
    assert {request.arrival_s for request in trace.requests} == {0.0}
    assert trace.answer_tokens == sum(request.max_new_tokens for request in trace.requests)


def test_a_trace_takes_a_duration_or_a_number() -> None:
    with pytest.raises(ValueError, match="either"):
        build_trace(replace(SPEC, num_requests=3))
