"""The sampler: from logits to the next token of each row.

The order of transformers' `generate`: bias, suppress, repetition penalty, frequency and presence penalties, and then
for rows that sample temperature, top-k, top-p, min-p, typical-p. A step that changes nothing for a row is not
run for it. The random stream belongs to the request: draw i of a seed is a hash of the two, and the token is
read off the cumulated probabilities in order of ids, so that neither the batch nor the device's generator has
a say. Reported log-probabilities are those of the model's own logits, before any of this, among the ids that a
constraint allows. Ties go to the lowest id.

Nothing here waits for a GPU: what is to be told is brought to the host with everything else of the step.

Shapes: `N` rows, `V` vocabulary, `M` rows of a subset, `A` rows that ask for log-probabilities, `P` (row, id) pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

import torch
from torch import Tensor

from peft_serve.core import Draw, SamplingParams
from peft_serve.model.bringing import Bringing
from peft_serve.model.masks import masked
from peft_serve.model.sending import sent, sent_values, taken

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

    def choose(self, logits_NV: Tensor, draws: Sequence[Draw], bringing: Bringing) -> Callable[[], list[Chosen]]:
        """One token for each row, told when everything has been brought; `draws` is parallel to the rows."""
        assert len(draws) == logits_NV.shape[0], "a draw for each row"
        if not draws:
            return list
        scores_NV = logits_NV = masked(logits_NV, draws)
        if self._banned:
            scores_NV = logits_NV.index_fill(1, sent([self._banned], logits_NV.device)[0], _NEVER)
        if any(_is_edited(draw) for draw in draws):
            scores_NV = edited(scores_NV.float(), draws)
        best_N = best_ids(scores_NV)
        ids_N = _exchanged(best_N, scores_NV, draws)
        # Where a row holds a NaN, that is the best of it.
        scores_N = scores_NV.gather(1, best_N.unsqueeze(1)).squeeze(1)
        found = bringing.add(torch.stack((ids_N.double(), scores_N.double())))
        reported = _reported(logits_NV, draws, ids_N, bringing)

        def told() -> list[Chosen]:
            ids, best = found.rows()
            more = reported()
            return [
                Chosen(token=int(i), logprob=logprob, top=top, is_number=value < inf)
                for i, value, (logprob, top) in zip(ids, best, more, strict=True)
            ]

        return told


def _exchanged(best_N: Tensor, scores_NV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The best ids, but for rows that draw at random or whose token is forced."""
    sampled = [row for row, draw in enumerate(draws) if is_sampled(draw.params)]
    if sampled:
        drawn_M = _sample(taken(scores_NV, sampled).float(), [draws[row] for row in sampled])
        best_N = best_N.index_copy(0, sent([sampled], best_N.device)[0], drawn_M)
    forced = {row: draw.forced for row, draw in enumerate(draws) if draw.forced is not None}
    if forced:
        rows_M, forced_M = sent([list(forced), list(forced.values())], best_N.device)
        best_N = best_N.index_copy(0, rows_M, forced_M)
    return best_N


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


def score(
    logits_NV: Tensor, wanted: Sequence[tuple[int, ...]], bringing: Bringing
) -> Callable[[], list[tuple[float, ...]]]:
    """log softmax(logits) at the wanted ids of each row, told when everything has been brought."""
    assert len(wanted) == logits_NV.shape[0], "a tuple of ids for each row"
    rows = [row for row, ids in enumerate(wanted) for _ in ids]
    if not rows:
        return lambda: [() for _ in wanted]
    asked = sorted(set(rows))
    norms_A = bringing.add(torch.logsumexp(taken(logits_NV, asked).float(), -1))
    rows_P, ids_P = sent([rows, [i for ids in wanted for i in ids]], logits_NV.device)
    picked_P = bringing.add(logits_NV[rows_P, ids_P].float())

    def told() -> list[tuple[float, ...]]:
        norms, picked = dict(zip(asked, norms_A.numbers, strict=True)), iter(picked_P.numbers)
        return [tuple(next(picked) - norms[row] for _ in ids) for row, ids in enumerate(wanted)]

    return told


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
        scores_NV[rows_P, ids_P] += sent_values(list(biased.values()), scores_NV)
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
        penalty_P = sent_values(list(repeated.values()), scores_NV)
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
        scores_NV[rows_P, ids_P] -= sent_values(list(counted.values()), scores_NV)
    return scores_NV


def _pairs(pairs: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    rows_P, ids_P = sent([[row for row, _ in pairs], [i for _, i in pairs]], device)
    return rows_P, ids_P


def _sample(scores_MV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """[M] An id for each row."""
    probs_MV = warped(scores_MV, [draw.params for draw in draws]).softmax(-1)
    cdf_MV = probs_MV.double().cumsum(-1)
    total_M1 = cdf_MV[:, -1:].contiguous()
    at_M = sent_values([uniform(draw.seed, draw.index) for draw in draws], cdf_MV)
    token_M1 = torch.searchsorted(cdf_MV, at_M[:, None] * total_M1, right=True)
    last_M1 = torch.searchsorted(cdf_MV, total_M1)  # the last id that has a probability
    return torch.minimum(token_M1, last_M1).clamp_(max=cdf_MV.shape[1] - 1).flatten()


def warped(scores_MV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Scores divided by temperature, -inf where a filter removes the id. Each filter runs on its own rows."""
    scores_MV = scores_MV / _column([p.temperature for p in params], scores_MV)
    size = scores_MV.shape[1]
    most = max((p.top_k for p in params if p.top_k < size), default=0)
    filters: tuple[tuple[_Filter, list[float], Callable[[float], bool]], ...] = (
        (partial(_beyond_top_k, most=most), [p.top_k for p in params], lambda k: 0 < k < size),
        (_beyond_top_p, [p.top_p for p in params], lambda p: p < 1),
        (_below_min_p, [p.min_p for p in params], lambda p: p > 0),
        (_beyond_typical_p, [p.typical_p for p in params], lambda p: p < 1),
    )
    for removed, values, is_on in filters:
        rows = [row for row, value in enumerate(values) if is_on(value)]
        if rows:
            part_MV = taken(scores_MV, rows)
            limit_M1 = _column([values[row] for row in rows], part_MV)
            kept_MV = part_MV.masked_fill(removed(part_MV, limit_M1), _NEVER)
            is_all = part_MV is scores_MV
            scores_MV = kept_MV if is_all else scores_MV.index_copy(0, sent([rows], scores_MV.device)[0], kept_MV)
    return scores_MV


_Filter = Callable[[Tensor, Tensor], Tensor]
"""(scores [M, V], limit [M, 1]) -> the ids to remove [M, V]."""


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return sent_values(values, like).unsqueeze(1)


def _beyond_top_k(scores_MV: Tensor, k_M1: Tensor, *, most: int) -> Tensor:
    """Below the k-th best; ties with it stay. `most` is the largest k."""
    best_MK = scores_MV.topk(most, -1).values
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


_More = tuple[float | None, tuple[tuple[int, float], ...]]
"""The log-probability of a row's token and the best ids, where they are asked for."""


def _reported(logits_NV: Tensor, draws: Sequence[Draw], ids_N: Tensor, bringing: Bringing) -> Callable[[], list[_More]]:
    """What is asked about each row's token."""
    asked = [r for r, draw in enumerate(draws) if draw.params.logprobs or draw.params.num_top_logprobs]
    if not asked:
        nothing: list[_More] = [(None, ())] * len(draws)
        return lambda: nothing
    log_AV = taken(logits_NV, asked).float().log_softmax(-1)
    own_A = bringing.add(log_AV.gather(1, taken(ids_N, asked).unsqueeze(1)))
    tops = best_of(log_AV, [draws[row].params.num_top_logprobs for row in asked], bringing)

    def told() -> list[_More]:
        each: list[_More] = [(None, ())] * len(draws)
        for row, own, top in zip(asked, own_A.numbers, tops(), strict=True):
            if draws[row].allowed is not None:  # what a constraint forbids is no alternative
                top = tuple(pair for pair in top if pair[1] > _NEVER)
            each[row] = own if draws[row].params.logprobs else None, top
        return each

    return told


def best_of(
    log_AV: Tensor, counts: Sequence[int], bringing: Bringing
) -> Callable[[], list[tuple[tuple[int, float], ...]]]:
    """The best ids of float32 rows with their numbers, as many of each row as its count says; among equals the lowest
    first."""
    most = min(max(counts, default=0), log_AV.shape[1])
    if not most:
        return lambda: [()] * len(counts)
    # Numbers that are in order where the scores are, and behind those of equal scores the ids, turned round.
    bits_AV = (log_AV + 0.0).view(torch.int32)
    ordered_AV = torch.where(bits_AV < 0, bits_AV ^ 0x7FFFFFFF, bits_AV).long()
    turned_V = torch.arange(log_AV.shape[1] - 1, -1, -1, device=log_AV.device)
    ids_AK = (ordered_AV * (1 << 32) + turned_V).topk(most, -1).indices
    found = bringing.add(torch.stack((ids_AK.double(), log_AV.gather(1, ids_AK).double()), dim=1))

    def told() -> list[tuple[tuple[int, float], ...]]:
        rows = zip(found.rows(), counts, strict=True)
        return [
            tuple((int(i), value) for i, value in zip(row[:most], row[most:], strict=True))[:count]
            for row, count in rows
        ]

    return told
