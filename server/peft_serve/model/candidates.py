"""Candidates: the best next tokens of a row, for a beam search, and the best ids behind any token.

A beam search sums log-probabilities. As in transformers' `generate`, bias, penalties and suppressed ids act on the
log-probabilities themselves, which are not made to sum to one again; a forced id has log-probability 0 and every other
id none. Knows no search. Among equals the lowest id comes first.

Shapes: `N` rows, `V` vocabulary, `K` the most candidates any row asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peft_serve.core import Candidate, Draw
from peft_serve.model.bringing import Bringing
from peft_serve.model.sampler import best_of, edited
from peft_serve.model.sending import sent, taken

_NEVER = float("-inf")

Top = tuple[tuple[int, float], ...]


def candidates(
    logits_NV: Tensor, draws: Sequence[Draw], banned: Sequence[int], bringing: Bringing
) -> Callable[[], list[tuple[Candidate, ...]]]:
    """The `num_candidates` best tokens of each row, told when everything has been brought; `banned` are ids the base
    never says, unless one is forced."""
    assert len(draws) == logits_NV.shape[0], "a draw for each row"
    log_NV = logits_NV.float().log_softmax(-1)
    scores_NV = edited(log_NV, draws)
    if banned:
        scores_NV.index_fill_(1, sent([list(banned)], scores_NV.device)[0], _NEVER)
    for row, draw in enumerate(draws):
        if draw.forced is not None:
            scores_NV[row] = _NEVER
            scores_NV[row, draw.forced] = 0.0
    most = min(max(draw.num_candidates for draw in draws), scores_NV.shape[1])
    best_NK = scores_NV.topk(most, -1)
    raw_NK = log_NV.gather(1, best_NK.indices)
    found = bringing.add(torch.stack((best_NK.indices.double(), best_NK.values.double(), raw_NK.double()), dim=1))

    def told() -> list[tuple[Candidate, ...]]:
        given = []
        for numbers, draw in zip(found.rows(), draws, strict=True):
            each = zip(numbers[:most], numbers[most : 2 * most], numbers[2 * most :], strict=True)
            best = sorted(each, key=lambda one: (-one[1], one[0]))[: draw.num_candidates]
            given.append(tuple(Candidate(int(i), score, raw) for i, score, raw in best))
        return given

    return told


def tops(logits_NV: Tensor, counts: Sequence[int], bringing: Bringing) -> Callable[[], list[Top]]:
    """The best ids of each row with their log-probabilities, as many as its count says."""
    asked = [row for row, count in enumerate(counts) if count]
    if not asked:
        return lambda: [()] * len(counts)
    best = best_of(taken(logits_NV, asked).float().log_softmax(-1), [counts[row] for row in asked], bringing)

    def told() -> list[Top]:
        found = dict(zip(asked, best(), strict=True))
        return [found.get(row, ()) for row in range(len(counts))]

    return told
