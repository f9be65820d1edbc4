"""The pass of an encoder: rows side by side, each with what its adapter puts in front of it.

Owns nothing but references. It tells the adapted sites whose tokens are whose and calls the family; what is read
from the states is for `readings`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from peft_serve.core import Row
from peft_serve.model.attention import Kind, Work
from peft_serve.model.base import ResidentBase
from peft_serve.model.families.family import ReadsRows
from peft_serve.model.passes import source_extents
from peft_serve.model.ragged import Front, plan_source
from peft_serve.model.routing import Stream
from peft_serve.model.sending import sent


class Fronts(Protocol):
    """What the adapters in slots put in front of a row."""

    def of(self, slot: int) -> Tensor | None:
        """A soft prompt [P, d]."""
        ...

    def is_bare(self, slot: int) -> bool:
        """Whether the soft prompt takes no position, type or norm."""
        ...

    def front(self, slot: int) -> Front | None:
        """Keys and values."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """The last hidden states of one row, those of its soft prompt first."""

    states_SD: Tensor
    num_virtual: int


class EncoderPass:
    """Reads whole rows."""

    def __init__(self, base: ResidentBase, fronts: Fronts) -> None:
        assert isinstance(base.runs, ReadsRows), "only an encoder reads whole rows"
        self._base = base
        self._family = base.runs
        self._fronts = fronts

    def run(self, rows: Sequence[Row]) -> list[States]:
        """The states of every row. Rows are sorted by slot, and bring their whole source."""
        assert all(row.source and not row.tokens and row.draw is None for row in rows), "an encoder generates nothing"
        if not self._family.is_padded:
            return self._run_together(rows)
        by_slot = (list(members) for _, members in groupby(rows, key=lambda row: row.slot))
        return [states for members in by_slot for states in self._run_together(members)]

    def _run_together(self, rows: Sequence[Row]) -> list[States]:
        counts = [(row.slot, len(row.source)) for row in rows]
        self._base.adapted.route(Stream.SOURCE, counts)
        embedded = self._family.embed(self._ids(t for row in rows for t in row.source))
        parts: list[Tensor] = []
        prompts = [self._fronts.of(row.slot) for row in rows]
        for prompt, part in zip(prompts, torch.split(embedded, [n for _, n in counts]), strict=True):
            parts.append(part if prompt is None else torch.cat((prompt.to(part.dtype), part)))
        lengths = [len(part) for part in parts]
        states = self._read(rows, torch.cat(parts), lengths)
        nums = [0 if prompt is None else len(prompt) for prompt in prompts]
        return [States(states_SD=x, num_virtual=n) for x, n in zip(torch.split(states, lengths), nums, strict=True)]

    def _read(self, rows: Sequence[Row], embeddings_SD: Tensor, lengths: Sequence[int]) -> Tensor:
        fronts = [self._fronts.front(row.slot) for row in rows]
        positions: list[int] = []
        segments: list[int] = []
        bare: list[int] = []
        for row, front, length in zip(rows, fronts, lengths, strict=True):
            num_front, num_prefix = (0, 0) if front is None else (front.num_tokens, front.num_positions)
            assert num_front + length == row.num_source, f"{row.request}: num_source does not count what is in front"
            num_prompt = length - len(row.source)
            if self._fronts.is_bare(row.slot):
                bare += range(len(positions), len(positions) + num_prompt)
                positions += [0] * num_prompt  # of no meaning
                positions += self._family.positions(row.source, num_prefix=num_prefix, num_prompt=0)
            else:
                positions += self._family.positions(row.source, num_prefix=num_prefix, num_prompt=num_prompt)
            own = row.segments if row.segments and self._family.has_segments else [0] * len(row.source)
            segments += [0] * num_prompt + list(own)
        self._route(rows, lengths)
        plan = plan_source(lengths, device=self._base.device, fronts=fronts)
        with self._base.runs.attention.running({Kind.SOURCE: Work(plan=plan)}):
            places = self._ids(bare) if bare else None
            return self._family.read(embeddings_SD, self._ids(positions), self._ids(segments), lengths, places)

    def _route(self, rows: Sequence[Row], lengths: Sequence[int]) -> None:
        """The sites of a padded family see its padding too."""
        each = [max(lengths)] * len(rows) if self._family.is_padded else lengths
        counts = [(row.slot, n) for row, n in zip(rows, each, strict=True)]
        self._base.adapted.route(Stream.SOURCE, counts, lambda: source_extents(rows, lengths, each))
        if self._family.num_positions:
            self._base.adapted.route(Stream.POSITIONS, [(rows[0].slot, self._family.num_positions)])

    def _ids(self, values: Iterable[int]) -> Tensor:
        return sent([list(values)], self._base.device)[0]
