"""Candidates: the best next tokens of a row, for a beam search, and the best ids behind any token.

A beam search sums log-probabilities. As in transformers' `generate`, bias, penalties and suppressed ids act on the
log-probabilities themselves, which are not made to sum to one again; a forced id has log-probability 0 and every other
id none. Knows no search. Among equals the lowest id comes first.

Shapes: `N` rows, `V` vocabulary, `K` the most candidates any row asks for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_serve.core import Candidate, Draw
from peft_serve.model.sampler import edited

_NEVER = float("-inf")

Top = tuple[tuple[int, float], ...]


def candidates(logits_NV: Tensor, draws: Sequence[Draw], banned: Sequence[int]) -> list[tuple[Candidate, ...]]:
    """The `num_candidates` best tokens of each row; `banned` are ids the base never says, unless one is forced."""
    assert len(draws) == logits_NV.shape[0], "a draw for each row"
    log_NV = logits_NV.float().log_softmax(-1)
    scores_NV = edited(log_NV, draws)
    scores_NV[:, list(banned)] = _NEVER
    for row, draw in enumerate(draws):
        if draw.forced is not None:
            scores_NV[row] = _NEVER
            scores_NV[row, draw.forced] = 0.0
    best = _best(scores_NV, [draw.num_candidates for draw in draws])
    ids = [(row, i) for row, top in enumerate(best) for i, _ in top]
    raw = iter(_at(log_NV, ids))
    return [tuple(Candidate(i, score, next(raw)) for i, score in top) for top in best]


def tops(logits_NV: Tensor, counts: Sequence[int]) -> list[Top]:
    """The best ids of each row with their log-probabilities, as many as its count says."""
    asked = [row for row, count in enumerate(counts) if count]
    if not asked:
        return [()] * len(counts)
    found = dict(zip(asked, _best(logits_NV[asked].float().log_softmax(-1), [counts[r] for r in asked]), strict=True))
    return [found.get(row, ()) for row in range(len(counts))]


def _best(scores_NV: Tensor, counts: Sequence[int]) -> list[Top]:
    most = min(max(counts), scores_NV.shape[1])
    best_NK = scores_NV.topk(most, -1)
    rows = zip(best_NK.indices.tolist(), best_NK.values.tolist(), counts, strict=True)
    return [
        tuple(sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))[:count])
        for ids, values, count in rows
    ]


def _at(scores_NV: Tensor, places: Sequence[tuple[int, int]]) -> list[float]:
    rows_P, ids_P = torch.tensor(places, dtype=torch.int64, device=scores_NV.device).unbind(1)
    given: list[float] = scores_NV[rows_P, ids_P].tolist()
    return given
