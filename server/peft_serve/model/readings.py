"""Readings: what requests that generate nothing take from the last hidden states of their rows.

Knows which states a reading looks at; logits are `heads`' business. A row whose reading has no head gets no
reading, and its neighbours never notice.

Shapes: `S` states of a row, `d` their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from peft_serve.adapters.heads import Reads
from peft_serve.adapters.primitives import HeadTask
from peft_serve.core import Reading
from peft_serve.model.heads import HeadJob, Heads

Rows = tuple[tuple[float, ...], ...]

_TASKS: Final = {
    Reading.SEQUENCE: HeadTask.SEQUENCE,
    Reading.TOKENS: HeadTask.TOKENS,
    Reading.SPANS: HeadTask.SPANS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A row's reading and the states its tokens came to, those of a soft prompt in front of them included."""

    slot: int
    reading: Reading
    states_SD: Tensor
    num_virtual: int = 0


def read(heads: Heads, asks: Sequence[Ask]) -> list[Rows]:
    """The reading of each row, () where its adapter and the base have no head for it. Asks are sorted by slot."""
    given: list[Rows] = [()] * len(asks)
    jobs: list[HeadJob] = []
    owners: list[int] = []
    for i, ask in enumerate(asks):
        task = _TASKS.get(ask.reading)
        if task is None:
            given[i] = _rows(_states(ask).float())
            continue
        head = heads.of(ask.slot, task)
        if head is not None:
            jobs.append(HeadJob(slot=ask.slot, head=head, states_ND=_looked_at(ask, head.form.reads)))
            owners.append(i)
    for i, logits_NL in zip(owners, heads.run(jobs), strict=True):
        given[i] = _rows(logits_NL)
    return given


def _states(ask: Ask) -> Tensor:
    """[1, d] for a reading of hidden states; the mean is over the prompt's own tokens."""
    if ask.reading is Reading.FIRST:
        return ask.states_SD[:1]
    if ask.reading is Reading.LAST:
        return ask.states_SD[-1:]
    return ask.states_SD[ask.num_virtual :].float().mean(dim=0, keepdim=True)


def _looked_at(ask: Ask, reads: Reads) -> Tensor:
    if reads is Reads.EVERY:
        return ask.states_SD[ask.num_virtual :]
    return ask.states_SD[:1] if reads is Reads.FIRST else ask.states_SD[-1:]


def _rows(values_NX: Tensor) -> Rows:
    return tuple(tuple(row) for row in values_NX.tolist())
