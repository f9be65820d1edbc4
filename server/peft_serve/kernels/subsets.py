"""Some tokens of a step: a slice where they lie side by side, an index where not, or a choice by slot.

A `Subset` picks them out of a tensor and puts results back. A `Batch` is a subset of runs of one length, so that
what is picked stacks to [runs, tokens, ...] and one batched product serves them all. Both are made once for a
division of tokens and serve every site. `Chosen` tokens may be others in every step that is replayed: all are
computed, and results are put by choice, so that what was computed for tokens of others, NaN or not, goes nowhere.
Nothing here knows whose the tokens are.

Shapes: `T` tokens of the step, `N` tokens of the subset, `G` runs of a batch, `P` tokens of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

Range = tuple[int, int]
"""Tokens [first, last)."""

Change = Callable[[Tensor], object]
"""Changes a tensor in place."""


class Tokens(Protocol):
    """Some tokens of a step, whoever picks them out: take may give others too, which put_ then leaves alone."""

    def take(self, x_T: Tensor) -> Tensor: ...

    def put_(self, y_T: Tensor, part_N: Tensor) -> None: ...

    def put_columns_(self, y_TO: Tensor, column_C: Tensor, part_NC: Tensor) -> None: ...

    def add_(self, y_T: Tensor, part_N: Tensor) -> None: ...

    def change_(self, y_T: Tensor, change: Change) -> None: ...


@dataclass(frozen=True, slots=True)
class Chosen:
    """The tokens whose slots have a row that is true: what is asked of the device is the same whose tokens they are."""

    is_own_S1: Tensor
    slot_T: Tensor

    def take(self, x_T: Tensor) -> Tensor:
        """All tokens."""
        return x_T

    def put_(self, y_T: Tensor, part_T: Tensor) -> None:
        """Overwrite the chosen tokens of y."""
        y_T.copy_(self._either(part_T, y_T))

    def put_columns_(self, y_TO: Tensor, column_C: Tensor, part_TC: Tensor) -> None:
        """Overwrite some columns, each named once, of the chosen tokens of y."""
        kept_TC = y_TO.index_select(1, column_C)
        y_TO.index_copy_(1, column_C, self._either(part_TC, kept_TC).to(y_TO.dtype))

    def add_(self, y_T: Tensor, part_T: Tensor) -> None:
        """Add to the chosen tokens of y."""
        self.put_(y_T, y_T + part_T)

    def change_(self, y_T: Tensor, change: Change) -> None:
        """Have the chosen tokens of y changed in place."""
        changed_T = y_T.clone()
        change(changed_T)
        self.put_(y_T, changed_T)

    def _either(self, own_T: Tensor, other_T: Tensor) -> Tensor:
        is_own_T1 = self.is_own_S1.index_select(0, self.slot_T)
        return torch.where(is_own_T1.view(-1, *[1] * (other_T.ndim - 1)), own_T, other_T)


@dataclass(frozen=True, slots=True)
class Subset:
    """Tokens [first, last), or those of `index_N`."""

    first: int
    last: int
    index_N: Tensor | None

    def take(self, x_T: Tensor) -> Tensor:
        """The subset's part of x, [N, ...]: a view where it can be one, so never to be written to."""
        return x_T[self.first : self.last] if self.index_N is None else x_T.index_select(0, self.index_N)

    def put_(self, y_T: Tensor, part_N: Tensor) -> None:
        """Overwrite the subset's part of y."""
        if self.index_N is None:
            y_T[self.first : self.last] = part_N
        else:
            y_T.index_copy_(0, self.index_N, part_N)

    def put_columns_(self, y_TO: Tensor, column_C: Tensor, part_NC: Tensor) -> None:
        """Overwrite some columns, each named once, of the subset's part of y."""
        if self.index_N is None:
            y_TO[self.first : self.last].index_copy_(1, column_C, part_NC)
        else:
            y_TO[self.index_N[:, None], column_C] = part_NC

    def add_(self, y_T: Tensor, part_N: Tensor) -> None:
        """Add to the subset's part of y."""
        if self.index_N is None:
            y_T[self.first : self.last].add_(part_N)
        else:
            y_T.index_add_(0, self.index_N, part_N)

    def change_(self, y_T: Tensor, change: Change) -> None:
        """Have the subset's part of y changed in place: where it lies, or as a copy that is put back."""
        if self.index_N is None:
            change(y_T[self.first : self.last])
        else:
            part_N = self.take(y_T)
            change(part_N)
            self.put_(y_T, part_N)


@dataclass(frozen=True, slots=True)
class Batch:
    """Runs of one length."""

    members: tuple[int, ...]  # which of the given ranges, in the order of the G axis
    num_places: int
    subset: Tokens

    def take(self, x_T: Tensor) -> Tensor:
        """[G, P, ...]"""
        part = self.subset.take(x_T)
        return part.reshape(len(self.members), self.num_places, *part.shape[1:])


def subset_of(ranges: Sequence[Range], device: torch.device) -> Subset:
    """The tokens of these ranges, in the order given; at least one token."""
    is_slice = all(last == first for (_, last), (first, _) in pairwise(ranges))
    index_N = None
    if not is_slice:
        index_N = torch.cat([torch.arange(first, last) for first, last in ranges]).to(device)
    return Subset(ranges[0][0], ranges[-1][1], index_N)


def batches_of(ranges: Sequence[Range], device: torch.device) -> tuple[Batch, ...]:
    """The ranges by length, each length one batch."""
    by_length: dict[int, list[int]] = {}
    for place, (first, last) in enumerate(ranges):
        by_length.setdefault(last - first, []).append(place)
    return tuple(
        Batch(tuple(members), length, subset_of([ranges[place] for place in members], device))
        for length, members in by_length.items()
    )
