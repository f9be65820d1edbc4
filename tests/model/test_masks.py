"""Masks over the vocabulary, alone and in the sampler."""

from __future__ import annotations

import pytest
import torch

from peft_serve.core import Draw, SamplingParams
from peft_serve.model.masks import masked
from tests.model.at_once import choose

SIZE = 37
NEVER = float("-inf")


def mask_of(ids: set[int], size: int = SIZE) -> bytes:
    return sum(1 << i for i in ids).to_bytes(-(-size // 8), "little")


def draw(allowed: bytes | None = None, *, forced: int | None = None, **params: object) -> Draw:
    return Draw(
        params=SamplingParams(**params),  # type: ignore[arg-type]
        seed=3,
        index=0,
        allowed=allowed,
        forced=forced,
    )


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(4, SIZE, generator=torch.Generator().manual_seed(1))


def test_only_allowed_ids_are_left_and_other_rows_are_not_touched(logits: torch.Tensor) -> None:
    allowed = {0, 7, 8, 36}
    kept = masked(logits, [draw(), draw(mask_of(allowed)), draw(), draw(mask_of({5}), forced=9)])
    assert torch.equal(kept[[0, 2, 3]], logits[[0, 2, 3]])
    left = {i for i in range(SIZE) if kept[1, i] > NEVER}
    assert left == allowed
    assert torch.equal(kept[1, sorted(allowed)], logits[1, sorted(allowed)])


def test_without_masks_the_very_tensor_comes_back(logits: torch.Tensor) -> None:
    assert masked(logits, [draw()] * 4) is logits


@pytest.mark.parametrize("size", [3, 16, SIZE, 100])
def test_a_mask_of_another_length_forbids_what_it_does_not_tell_of(logits: torch.Tensor, size: int) -> None:
    kept = masked(logits, [draw(mask_of(set(range(size)), size))] * 4)
    assert int((kept > NEVER).sum()) == 4 * min(size, SIZE)


def test_the_best_allowed_id_is_chosen_whatever_penalties_say(logits: torch.Tensor) -> None:
    allowed = {3, 20, 21}
    draws = [
        draw(mask_of(allowed)),
        draw(mask_of(allowed), repetition_penalty=5.0),
        draw(mask_of(allowed), do_sample=True, temperature=3.0, top_k=30),
        draw(),
    ]
    alone = choose(logits[3:], draws[3:])
    chosen = choose(logits, draws)
    assert chosen[0].token == max(allowed, key=lambda i: float(logits[0, i]))
    assert {one.token for one in chosen[:3]} <= allowed
    assert chosen[3] == alone[0]


def test_log_probabilities_are_those_among_what_is_allowed(logits: torch.Tensor) -> None:
    allowed = [3, 20]
    (told,) = choose(logits[:1], [draw(mask_of(set(allowed)), logprobs=True, num_top_logprobs=5)])
    expected = logits[0, allowed].log_softmax(-1)
    assert dict(told.top) == pytest.approx(dict(zip(allowed, expected.tolist(), strict=True)))
    assert told.logprob == pytest.approx(float(expected.max()))


def test_what_the_base_never_says_stays_unsaid(logits: torch.Tensor) -> None:
    best = int(logits[0, [3, 20]].argmax())
    banned, left = (3, 20) if best == 0 else (20, 3)
    (chosen,) = choose(logits[:1], [draw(mask_of({3, 20}))], banned=[banned])
    assert chosen.token == left
