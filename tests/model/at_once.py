"""What the sampler and its like tell of logits, brought to the host at once, for tests that ask one thing only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from peft_serve.core import Candidate, Draw
from peft_serve.model import candidates as own
from peft_serve.model.bringing import Bringing
from peft_serve.model.candidates import Top
from peft_serve.model.sampler import Chosen, Sampler
from peft_serve.model.sampler import score as score_of

T = TypeVar("T")


def told(ask: Callable[[Bringing], Callable[[], T]]) -> T:
    bringing = Bringing()
    answer = ask(bringing)
    bringing.bring()
    return answer()


def choose(logits_NV: Tensor, draws: Sequence[Draw], banned: Sequence[int] = ()) -> list[Chosen]:
    return told(lambda bringing: Sampler(banned).choose(logits_NV, draws, bringing))


def score(logits_NV: Tensor, wanted: Sequence[tuple[int, ...]]) -> list[tuple[float, ...]]:
    return told(lambda bringing: score_of(logits_NV, wanted, bringing))


def candidates(logits_NV: Tensor, draws: Sequence[Draw], banned: Sequence[int]) -> list[tuple[Candidate, ...]]:
    return told(lambda bringing: own.candidates(logits_NV, draws, banned, bringing))


def tops(logits_NV: Tensor, counts: Sequence[int]) -> list[Top]:
    return told(lambda bringing: own.tops(logits_NV, counts, bringing))
