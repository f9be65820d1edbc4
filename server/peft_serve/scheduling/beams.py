"""Beam search: which continuations of a prompt are followed, and which have been found to be the best.

The semantics of transformers' `generate(num_beams=k, do_sample=False)` for one prompt (`GenerationMixin._beam_search`
of transformers 5): the k most likely unfinished beams go on; a beam that ends among the k best candidates of its step
is kept with its log-probability divided by length ** length_penalty, as long as it is one of the best k; and the
search is over when no running beam can better the worst of these, by the rule that `early_stopping` chooses.

Pure books over tokens and numbers: where the keys and values of a beam are is `Memory`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from peft_serve.core import Candidate, Continuation, Request, SamplingParams

Top = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """A beam under way. `parent` is the place of the one it continues, among those of the step before."""

    tokens: tuple[int, ...] = ()
    score: float = 0.0  # the sum of its candidates' scores
    logprobs: tuple[float, ...] = ()
    tops: tuple[Top, ...] = ()
    parent: int = 0

    def followed_by(self, candidate: Candidate, top: Top, *, parent: int) -> Hypothesis:
        return Hypothesis(
            tokens=(*self.tokens, candidate.token),
            score=self.score + candidate.score,
            logprobs=(*self.logprobs, candidate.logprob),
            tops=(*self.tops, top),
            parent=parent,
        )


@dataclass(frozen=True, slots=True)
class Given:
    """What the model says behind a beam: candidates, best first, and the alternatives to report."""

    candidates: tuple[Candidate, ...]
    top: Top = ()


class BeamSearch:
    """The search behind one prompt. It begins with one empty beam, the prompt itself."""

    def __init__(
        self,
        *,
        num_beams: int,
        eos_ids: frozenset[int],
        max_new_tokens: int,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
    ) -> None:
        """`max_new_tokens` counts the end-of-sequence id, and so does the length that is penalised."""
        self._num_beams = num_beams
        self._eos_ids = eos_ids
        self._max_new_tokens = max_new_tokens
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._running: tuple[Hypothesis, ...] = (Hypothesis(),)
        self._finished: list[Continuation] = []
        self._is_over = False

    @property
    def num_candidates(self) -> int:
        """How many of its best tokens each beam must be given: so that k are left when k of them end it."""
        return num_candidates(self._num_beams, self._eos_ids)

    @property
    def running(self) -> tuple[Hypothesis, ...]:
        """The beams to be computed next, best first."""
        return self._running

    @property
    def is_over(self) -> bool:
        return self._is_over

    def best(self, count: int) -> tuple[Continuation, ...]:
        """The best of the finished beams, best first."""
        return tuple(self._finished[:count])

    def advance(self, given: Sequence[Given], *, is_last: bool = False) -> None:
        """Take the model's word on every running beam, in their order; `is_last`: nothing may follow."""
        assert not self._is_over, "the search is over"
        candidates = self._ranked(given)
        length = len(self._running[0].tokens) + 1
        is_last = is_last or length >= self._max_new_tokens
        ends = [is_last or each.tokens[-1] in self._eos_ids for each in candidates]
        self._finish(candidates[: self._num_beams], ends)
        going = (each for each, is_end in zip(candidates, ends, strict=True) if not is_end)
        self._running = tuple(islice(going, self._num_beams))
        self._is_over = not self._running or not self._may_improve(length)

    def _ranked(self, given: Sequence[Given]) -> list[Hypothesis]:
        """The best continuations of all running beams. What is impossible, or no number, is none."""
        ranked: list[tuple[float, int, int, Candidate]] = []
        for parent, (beam, one) in enumerate(zip(self._running, given, strict=True)):
            for place, candidate in enumerate(one.candidates):
                score = beam.score + candidate.score
                if score > -math.inf:
                    ranked.append((-score, parent, place, candidate))
        ranked.sort(key=lambda entry: entry[:3])
        return [
            self._running[parent].followed_by(candidate, given[parent].top, parent=parent)
            for _, parent, _, candidate in ranked[: self.num_candidates]
        ]

    def _finish(self, candidates: Sequence[Hypothesis], ends: Sequence[bool]) -> None:
        ended = [each for each, is_end in zip(candidates, ends, strict=False) if is_end]
        self._finished += [
            Continuation(
                tokens=each.tokens,
                score=each.score / _penalty(len(each.tokens), self._length_penalty),
                logprobs=each.logprobs,
                tops=each.tops,
                is_ended=each.tokens[-1] in self._eos_ids,
            )
            for each in ended
        ]
        self._finished.sort(key=lambda each: -each.score)
        del self._finished[self._num_beams :]

    def _may_improve(self, length: int) -> bool:
        if len(self._finished) < self._num_beams:
            return True
        if self._early_stopping is True:
            return False
        is_hopeful = self._early_stopping == "never" and self._length_penalty > 0
        longest = self._max_new_tokens if is_hopeful else length
        return self._running[0].score / _penalty(longest, self._length_penalty) > self._finished[-1].score


def _penalty(length: int, exponent: float) -> float:
    return math.pow(length, exponent)


def num_candidates(num_beams: int, eos_ids: frozenset[int]) -> int:
    """See `BeamSearch.num_candidates`."""
    return max(2, 1 + len(eos_ids)) * num_beams


def begin_search(request: Request, *, max_new_tokens: int) -> BeamSearch:
    """The search that the request asks for, over continuations of at most so many tokens."""
    params: SamplingParams = request.sampling
    return BeamSearch(
        num_beams=params.num_beams,
        eos_ids=frozenset() if params.ignore_eos else request.eos_ids,
        max_new_tokens=max_new_tokens,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
    )
