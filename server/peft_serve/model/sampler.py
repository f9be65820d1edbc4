"""The sampler: from logits to the next token of each row.

The order of transformers' `generate`: bias, suppress, repetition penalty, frequency and presence penalties, and then
for rows that sample temperature, top-k, top-p, min-p, typical-p. A step that changes nothing for a row is not
run for it. The random stream belongs to the request: draw i of a seed is a hash of the two, and the token is
read off the cumulated probabilities in order of ids, so that neither the batch nor the device's generator has
a say. Reported log-probabilities are those of the model's own logits, before any of this, among the ids that a
constraint allows. Ties go to the lowest id.

Shapes: `N` rows, `V` vocabulary, `M` rows of a subset, `P` (row, id) pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from peft_serve.core import Draw, SamplingParams
from peft_serve.model.masks import masked

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_NEVER = float("-inf")
_PART = 128  # ids of a part of the vocabulary, where the best one is looked for in parts,
_MANY = 1 << 16  # which pays for so many scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The next token of a row, and what was asked about it."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # (id, log-probability), best first
    is_number: bool = True  # False: the scores came to NaN or infinity, and the token means nothing


class Sampler:
    """Chooses tokens. It keeps nothing between calls."""

    def __init__(self, banned: Sequence[int] = ()) -> None:
        """`banned` are ids that the base never says, unless an id is forced."""
        self._banned = list(banned)

    def choose(self, logits_NV: Tensor, draws: Sequence[Draw]) -> list[Chosen]:
        """One token for each row; `draws` is parallel to the rows."""
        assert len(draws) == logits_NV.shape[0], "a draw for each row"
        if not draws:
            return []
        scores_NV = logits_NV = masked(logits_NV, draws)
        if self._banned:
            scores_NV = logits_NV.clone()
            scores_NV[:, self._banned] = _NEVER
        if any(_is_edited(draw) for draw in draws):
            scores_NV = edited(scores_NV.float(), draws)
        tokens, best = _with_scores(scores_NV, best_ids(scores_NV))
        sampled = [row for row, draw in enumerate(draws) if is_sampled(draw.params)]
        if sampled:
            drawn = _sample(scores_NV[sampled].float(), [draws[row] for row in sampled])
            for row, token in zip(sampled, drawn, strict=True):
                tokens[row] = token
        for row, draw in enumerate(draws):
            if draw.forced is not None:
                tokens[row] = draw.forced
        chosen = _reported(logits_NV, draws, tokens)
        return [one if value < inf else replace(one, is_number=False) for one, value in zip(chosen, best, strict=True)]


def best_ids(scores_NV: Tensor) -> Tensor:
    """[N] The id of each row's best score, the lowest among equals.

    A CPU finds the place of a maximum one element after the other, the maximum itself a vector at a time: so it finds
    the part with the maximum first, and the place inside it (docs/decisions/0008).
    """
    size = scores_NV.shape[1]
    if scores_NV.device.type != "cpu" or size < _PART or scores_NV.numel() < _MANY:
        return scores_NV.argmax(-1)
    whole = size // _PART * _PART
    best_NP = scores_NV[:, :whole].view(len(scores_NV), -1, _PART).amax(-1)
    if whole < size:
        best_NP = torch.cat((best_NP, scores_NV[:, whole:].amax(-1, keepdim=True)), dim=1)
    first_N1 = best_NP.argmax(-1, keepdim=True) * _PART
    ids_NP: Tensor = (first_N1 + torch.arange(_PART)).clamp_(max=size - 1)
    places_N1 = scores_NV.gather(1, ids_NP).argmax(-1, keepdim=True)
    return ids_NP.gather(1, places_N1).squeeze(1)


def _with_scores(scores_NV: Tensor, ids_N: Tensor) -> tuple[list[int], list[float]]:
    """Ids and their scores, brought to the host at once. Where a row holds a NaN, that is the best of it."""
    both_2N = torch.stack((ids_N.double(), scores_NV.gather(1, ids_N.unsqueeze(1)).squeeze(1).double()))
    ids, scores = both_2N.tolist()
    return [int(i) for i in ids], scores


def score(logits_NV: Tensor, wanted: Sequence[tuple[int, ...]]) -> list[tuple[float, ...]]:
    """log softmax(logits) at the wanted ids of each row."""
    assert len(wanted) == logits_NV.shape[0], "a tuple of ids for each row"
    rows = [row for row, ids in enumerate(wanted) for _ in ids]
    if not rows:
        return [() for _ in wanted]
    asked = sorted(set(rows))
    norms = dict(zip(asked, torch.logsumexp(logits_NV[asked].float(), -1).tolist(), strict=True))
    picked = iter(logits_NV[rows, [i for ids in wanted for i in ids]].float().tolist())
    return [tuple(next(picked) - norms[row] for _ in ids) for row, ids in enumerate(wanted)]


def uniform(seed: int, index: int) -> float:
    """The draw's number in [0, 1): 53 bits of splitmix64 (Steele, Lea and Flood 2014) over seed and index."""
    word = _mixed((seed & _WORD) + _GOLDEN)
    word = _mixed(word + (index + 1) * _GOLDEN)
    return float(word >> 11) / float(1 << 53)


def _mixed(word: int) -> int:
    word &= _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def is_sampled(params: SamplingParams) -> bool:
    """Whether the row draws at random; a temperature of 0 is greedy."""
    return params.do_sample and params.temperature > 0


def _is_edited(draw: Draw) -> bool:
    return bool(draw.suppress) or bool(draw.params.logit_bias) or draw.params.needs_history


def edited(scores_NV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """A copy with bias added, suppressed ids at -inf and penalties applied."""
    scores_NV = scores_NV.clone()
    size = scores_NV.shape[1]
    biased = {(row, i): bias for row, draw in enumerate(draws) for i, bias in draw.params.logit_bias if i < size}
    if biased:
        rows_P, ids_P = _pairs(list(biased), scores_NV.device)
        scores_NV[rows_P, ids_P] += scores_NV.new_tensor(list(biased.values()))
    hidden = [(row, i) for row, draw in enumerate(draws) for i in draw.suppress if i < size]
    if hidden:
        rows_P, ids_P = _pairs(hidden, scores_NV.device)
        scores_NV[rows_P, ids_P] = _NEVER
    repeated = {
        (row, i): draw.params.repetition_penalty
        for row, draw in enumerate(draws)
        if draw.params.repetition_penalty != 1.0
        for i in (*draw.prompt_history, *draw.output_history)
        if i < size
    }
    if repeated:
        rows_P, ids_P = _pairs(list(repeated), scores_NV.device)
        penalty_P = scores_NV.new_tensor(list(repeated.values()))
        score_P = scores_NV[rows_P, ids_P]
        scores_NV[rows_P, ids_P] = torch.where(score_P < 0, score_P * penalty_P, score_P / penalty_P)
    counted = {
        (row, i): draw.params.frequency_penalty * count + draw.params.presence_penalty
        for row, draw in enumerate(draws)
        if draw.params.frequency_penalty or draw.params.presence_penalty
        for i, count in Counter(draw.output_history).items()
        if i < size
    }
    if counted:
        rows_P, ids_P = _pairs(list(counted), scores_NV.device)
        scores_NV[rows_P, ids_P] -= scores_NV.new_tensor(list(counted.values()))
    return scores_NV


def _pairs(pairs: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    both = torch.tensor(pairs, dtype=torch.int64, device=device)
    return both[:, 0], both[:, 1]


def _sample(scores_MV: Tensor, draws: Sequence[Draw]) -> list[int]:
    probs_MV = warped(scores_MV, [draw.params for draw in draws]).softmax(-1)
    cdf_MV = probs_MV.double().cumsum(-1)
    total_M1 = cdf_MV[:, -1:].contiguous()
    at = torch.tensor([[uniform(draw.seed, draw.index)] for draw in draws], dtype=torch.float64)
    token_M1 = torch.searchsorted(cdf_MV, at.to(cdf_MV.device) * total_M1, right=True)
    last_M1 = torch.searchsorted(cdf_MV, total_M1)  # the last id that has a probability
    return [int(i) for i in torch.minimum(token_M1, last_M1).clamp_(max=cdf_MV.shape[1] - 1).flatten().tolist()]


def warped(scores_MV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Scores divided by temperature, -inf where a filter removes the id. Each filter runs on its own rows."""
    scores_MV = scores_MV / _column([p.temperature for p in params], scores_MV)
    size = scores_MV.shape[1]
    filters: tuple[tuple[_Filter, list[float], Callable[[float], bool]], ...] = (
        (_beyond_top_k, [p.top_k for p in params], lambda k: 0 < k < size),
        (_beyond_top_p, [p.top_p for p in params], lambda p: p < 1),
        (_below_min_p, [p.min_p for p in params], lambda p: p > 0),
        (_beyond_typical_p, [p.typical_p for p in params], lambda p: p < 1),
    )
    for removed, values, is_on in filters:
        rows = [row for row, value in enumerate(values) if is_on(value)]
        if rows:
            part_MV = scores_MV[rows]
            limit_M1 = _column([values[row] for row in rows], part_MV)
            scores_MV[rows] = part_MV.masked_fill(removed(part_MV, limit_M1), _NEVER)
    return scores_MV


_Filter = Callable[[Tensor, Tensor], Tensor]
"""(scores [M, V], limit [M, 1]) -> the ids to remove [M, V]."""


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return like.new_tensor(values).unsqueeze(1)


def _beyond_top_k(scores_MV: Tensor, k_M1: Tensor) -> Tensor:
    """Below the k-th best; ties with it stay."""
    best_MK = scores_MV.topk(int(k_M1.max()), -1).values
    return scores_MV < best_MK.gather(1, k_M1.long() - 1)


def _beyond_top_p(scores_MV: Tensor, p_M1: Tensor) -> Tensor:
    """Outside the smallest set of best ids that holds p of the mass (nucleus sampling, Holtzman et al. 2020)."""
    rising_MV, order_MV = scores_MV.sort(dim=-1, stable=True)
    removed_MV = rising_MV.softmax(-1).cumsum(-1) <= 1 - p_M1
    removed_MV[:, -1] = False
    return removed_MV.scatter(1, order_MV, removed_MV)


def _below_min_p(scores_MV: Tensor, p_M1: Tensor) -> Tensor:
    """Less likely than p times the best id (Nguyen et al. 2024)."""
    probs_MV = scores_MV.softmax(-1)
    best = probs_MV.max(-1, keepdim=True)
    return (probs_MV < p_M1 * best.values).scatter_(1, best.indices, False)


def _beyond_typical_p(scores_MV: Tensor, p_M1: Tensor) -> Tensor:
    """Outside the ids whose surprise is nearest to the entropy and that hold p of the mass (Meister et al. 2022)."""
    log_MV = scores_MV.log_softmax(-1)
    entropy_M1 = -(log_MV * log_MV.exp()).nansum(-1, keepdim=True)
    distance_MV, order_MV = (-log_MV - entropy_M1).abs().sort(dim=-1, stable=True)
    mass_MV = scores_MV.gather(-1, order_MV).softmax(-1).cumsum(-1)
    last_M1 = (mass_MV < p_M1).sum(1, keepdim=True).clamp_(max=scores_MV.shape[1] - 1)
    removed_MV = distance_MV > distance_MV.gather(1, last_M1)
    removed_MV[:, 0] = False
    return removed_MV.scatter(1, order_MV, removed_MV)


def _reported(logits_NV: Tensor, draws: Sequence[Draw], tokens: Sequence[int]) -> list[Chosen]:
    asked = [r for r, draw in enumerate(draws) if draw.params.logprobs or draw.params.num_top_logprobs]
    chosen = [Chosen(token=token) for token in tokens]
    if not asked:
        return chosen
    for row, log_V in zip(asked, logits_NV[asked].float().log_softmax(-1), strict=True):
        params = draws[row].params
        chosen[row] = Chosen(
            token=tokens[row],
            logprob=float(log_V[tokens[row]]) if params.logprobs else None,
            top=_top(log_V, min(params.num_top_logprobs, _num_possible(log_V, draws[row]))),
        )
    return chosen


def _num_possible(log_V: Tensor, draw: Draw) -> int:
    """How many ids there are to tell of: what a constraint forbids is no alternative."""
    return log_V.shape[0] if draw.allowed is None else int((log_V > _NEVER).sum())


def _top(log_V: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The best `count` ids; among equals the lowest first."""
    if not count:
        return ()
    least = log_V.topk(count).values[-1]
    ids = (log_V >= least).nonzero().flatten()
    best = log_V[ids].sort(descending=True, stable=True)
    return tuple(zip(ids[best.indices[:count]].tolist(), best.values[:count].tolist(), strict=True))
