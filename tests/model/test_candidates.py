"""Candidates of beams against transformers' processors on log-probabilities, and best ids against a sort."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from peft_serve.core import Draw, SamplingParams
from tests.model.at_once import candidates, choose, tops

VOCAB = 40


def logits(num_rows: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def asking(count: int, *, suppress: tuple[int, ...] = (), forced: int | None = None, **params: object) -> Draw:
    return Draw(
        params=SamplingParams(**params),  # type: ignore[arg-type]
        seed=0,
        index=3,
        num_candidates=count,
        prompt_history=(4, 5, 6),
        output_history=(7, 8, 7),
        suppress=suppress,
        forced=forced,
    )


def test_candidates_are_log_probabilities_as_transformers_processes_them() -> None:
    scores = logits(3)
    draws = [
        asking(6),
        asking(8, repetition_penalty=1.7, logit_bias=((9, 3.0), (7, -2.0)), suppress=(1, 2)),
        asking(4, repetition_penalty=0.5),
    ]
    given = candidates(scores, draws, banned=(11,))
    ids = torch.tensor([[4, 5, 6, 7, 8, 7]])
    for row, draw in enumerate(draws):
        raw = scores[row : row + 1].log_softmax(-1)
        processed = raw.clone()
        if draw.params.logit_bias:
            processed = hf.SequenceBiasLogitsProcessor([[[i], b] for i, b in draw.params.logit_bias])(ids, processed)
        if draw.params.repetition_penalty != 1.0:
            processed = hf.RepetitionPenaltyLogitsProcessor(draw.params.repetition_penalty)(ids, processed)
        processed[:, [*draw.suppress, 11]] = -math.inf
        best = processed[0].topk(draw.num_candidates)
        assert [each.token for each in given[row]] == best.indices.tolist()
        assert [each.score for each in given[row]] == pytest.approx(best.values.tolist())
        assert [each.logprob for each in given[row]] == pytest.approx(raw[0, best.indices].tolist())


def test_a_forced_id_is_certain_and_the_only_one() -> None:
    (given,) = candidates(logits(1), [asking(4, forced=11)], banned=(11,))
    assert (given[0].token, given[0].score) == (11, 0.0)
    assert given[0].logprob < 0, "what the model thinks of it is told all the same"
    assert {each.score for each in given[1:]} == {-math.inf}


def test_a_small_vocabulary_gives_all_it_has() -> None:
    (given,) = candidates(logits(1), [asking(99)], banned=())
    assert sorted(each.token for each in given) == list(range(VOCAB))


def test_equal_candidates_come_in_order_of_ids() -> None:
    (given,) = candidates(torch.zeros(1, VOCAB), [asking(VOCAB)], banned=())
    assert [each.token for each in given] == list(range(VOCAB))


def test_the_best_ids_of_some_rows() -> None:
    scores = logits(3, seed=4)
    given = tops(scores, [2, 0, 5])
    assert [len(each) for each in given] == [2, 0, 5]
    for row in (0, 2):
        log = scores[row].log_softmax(-1)
        order = sorted(range(VOCAB), key=lambda i: -float(log[i]))
        assert [i for i, _ in given[row]] == order[: len(given[row])]
        assert [value for _, value in given[row]] == pytest.approx([float(log[i]) for i in order[: len(given[row])]])
    assert tops(scores, [0, 0, 0]) == [(), (), ()]


def test_a_bias_changes_its_own_row_and_no_reported_log_probability() -> None:
    scores = logits(2).repeat(2, 1)
    plain = SamplingParams(logprobs=True)
    biased = SamplingParams(logprobs=True, logit_bias=((17, 50.0), (99, 1.0)))
    draws = [Draw(params=params, seed=0, index=0) for params in (plain, plain, biased, plain)]
    first, second, changed, same = choose(scores, draws)
    assert changed.token == 17
    assert changed.logprob == pytest.approx(float(scores[0].log_softmax(-1)[17]))
    assert (same.token, same.logprob) == (second.token, second.logprob)
    assert first.token == int(scores[0].argmax())
