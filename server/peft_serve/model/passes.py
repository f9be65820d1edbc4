"""The passes through the model that make up a step.

Owns nothing but references: it turns rows into plans, tells the adapted sites which tokens are whose, and
calls the family. It knows no sampling and no adapter beyond its slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from peft_serve.core import Row
from peft_serve.model.attention import Kind, Work
from peft_serve.model.base import ResidentBase
from peft_serve.model.extents import Extent
from peft_serve.model.families.family import ReadsPrompts, ReadsSources
from peft_serve.model.pools import KVPool
from peft_serve.model.ragged import Front, Span, plan_cross, plan_self, plan_source
from peft_serve.model.routing import Stream, acting_runs
from peft_serve.model.sending import sent


class InFront(Protocol):
    """What the adapters in slots put in front of a row, beside what is in its blocks already."""

    def of(self, slot: int) -> Tensor | None:
        """A soft prompt [P, d] for the encoder."""
        ...

    def front(self, slot: int) -> Front | None:
        """Keys and values for the encoder."""
        ...

    def cross(self, slot: int) -> Front | None:
        """Keys and values in front of the encoded source."""
        ...

    def absent(self, slot: int) -> frozenset[int]:
        """Layers of the decoder that do not read the positions in front which carry none."""
        ...


class NothingInFront:
    """For rows without adapters."""

    def of(self, slot: int) -> Tensor | None:  # noqa: ARG002 - the signature is the contract
        return None

    def is_bare(self, slot: int) -> bool:  # noqa: ARG002
        return False

    def front(self, slot: int) -> Front | None:  # noqa: ARG002
        return None

    def cross(self, slot: int) -> Front | None:  # noqa: ARG002
        return None

    def absent(self, slot: int) -> frozenset[int]:  # noqa: ARG002
        return frozenset()


class Passes:
    """Encode, decode, and read a soft prompt, over rows side by side."""

    def __init__(self, base: ResidentBase, *, pool: KVPool, cross_pool: KVPool | None) -> None:
        self._base = base
        self._pool = pool
        self._cross_pool = cross_pool

    def encode(self, rows: Sequence[Row], in_front: InFront) -> Tensor | None:
        """Encode the rows that bring a source, each behind what its slot has in front of it: [1, S, d], or None."""
        new = [row for row in rows if row.source]
        if not new:
            return None
        family = self._base.runs
        assert isinstance(family, ReadsSources), "a row with a source on a model without an encoder"
        tokens = self._ids(t for row in new for t in row.source)
        self._route(Stream.SOURCE, ((row.slot, len(row.source)) for row in new))
        embedded = torch.split(family.embed(tokens), [len(row.source) for row in new])
        parts: list[Tensor] = []
        lengths: list[int] = []
        for row, part in zip(new, embedded, strict=True):
            prompt, cross = in_front.of(row.slot), in_front.cross(row.slot)
            whole = part if prompt is None else family.behind(prompt, part)
            num_source = len(whole) + (0 if cross is None else cross.num_tokens)
            assert num_source == row.num_source, f"{row.request}: num_source does not count what is in front"
            parts.append(whole)
            lengths.append(len(whole))
        counts = zip((row.slot for row in new), lengths, strict=True)
        self._route(Stream.SOURCE, counts, lambda: source_extents(new, lengths, lengths))
        positions = self._ids(p for n in lengths for p in range(n))
        fronts = [in_front.front(row.slot) for row in new]
        work = {Kind.SOURCE: Work(plan=plan_source(lengths, device=self._base.device, fronts=fronts))}
        with self._base.runs.attention.running(work):
            return family.encode(torch.cat(parts), positions)

    def decode(
        self, rows: Sequence[Row], source: Tensor | None, keep: Mapping[int, int], in_front: InFront
    ) -> Tensor | None:
        """Run the decoder over all rows; float32 logits [N, V] after the last `keep[i]` tokens of row i.

        `source` is what `encode` gave for these rows. None if nothing is kept.
        """
        runs = (run for row in rows for run in _runs_of_last(row, len(row.tokens)))
        self._route(Stream.TARGET, runs, lambda: _target_extents(rows))
        self._route(Stream.HEAD, (run for i, row in enumerate(rows) for run in _runs_of_last(row, keep.get(i, 0))))
        kept: list[int] = []
        at = 0
        for i, row in enumerate(rows):
            at += len(row.tokens)
            kept.extend(range(at - keep.get(i, 0), at))
        ids = [t for row in rows for t in row.tokens]
        places = [row.start - row.num_unplaced + i for row in rows for i in range(len(row.tokens))]
        tokens, positions, keep_N = sent([ids, places, kept], self._base.device)
        with self._base.runs.attention.running(self._works(rows, in_front)):
            if not kept:
                self._base.runs.hidden(tokens, positions, source)
                return None
            return self._base.runs.logits(tokens, positions, keep_N, source).float()

    def read_prompt(self, slot: int, embeddings_PD: Tensor, *, start: int, blocks: tuple[int, ...]) -> None:
        """Compute the keys and values of a soft prompt into blocks, from context position `start` on."""
        family = self._base.runs
        assert isinstance(family, ReadsPrompts), "a soft prompt for the decoder of a model with an encoder"
        span = Span(num_tokens=embeddings_PD.shape[0], start=start, blocks=blocks)
        self._route(Stream.TARGET, [(slot, span.num_tokens)])
        plan = plan_self([span], block_size=self._pool.block_size, device=self._base.device)
        self._pool.clear(plan.clears)
        with self._base.runs.attention.running({Kind.SELF: Work(plan=plan, pool=self._pool)}):
            family.read_prompt(embeddings_PD, self._ids(range(span.start, span.stop)))

    def _works(self, rows: Sequence[Row], in_front: InFront) -> dict[Kind, Work]:
        device = self._base.device
        plan = plan_self(spans_of(rows, in_front), block_size=self._pool.block_size, device=device)
        self._pool.clear(plan.clears)
        works = {Kind.SELF: Work(plan=plan, pool=self._pool)}
        if self._cross_pool is not None:
            works[Kind.CROSS] = self._crossing(rows, in_front, self._cross_pool)
        return works

    def _crossing(self, rows: Sequence[Row], in_front: InFront, pool: KVPool) -> Work:
        """Every row over its source; a new row's source is written behind what its adapter has in front of it."""
        crossing, new = crossing_of(rows, in_front), []
        for row in rows:
            if row.source:
                front = in_front.cross(row.slot)
                num_front = 0 if front is None else front.num_tokens
                if front is not None:
                    pool.store(row.cross_blocks, front.keys_LHPD, front.values_LHPD)
                new.append(Span(num_tokens=row.num_source - num_front, start=num_front, blocks=row.cross_blocks))
        plan = plan_cross(crossing, new, block_size=pool.block_size, device=self._base.device)
        pool.clear(plan.clears)
        return Work(plan=plan, pool=pool)

    def _route(
        self,
        stream: Stream,
        counts: Iterable[tuple[int, int]],
        extents: Callable[[], Iterable[Extent]] = tuple,
    ) -> None:
        self._base.adapted.route(stream, counts, extents)

    def _ids(self, values: Iterable[int]) -> Tensor:
        return sent([list(values)], self._base.device)[0]


def spans_of(rows: Sequence[Row], in_front: InFront) -> list[Span]:
    """Each row as its self-attention sees it."""
    return [
        Span(
            num_tokens=len(row.tokens),
            start=row.start,
            blocks=row.blocks,
            num_unplaced=row.num_unplaced,
            absent=in_front.absent(row.slot),
        )
        for row in rows
    ]


def crossing_of(rows: Sequence[Row], in_front: InFront) -> list[Span]:
    """Each row as its cross-attention sees it."""
    fronts = {row.slot: in_front.cross(row.slot) for row in rows}
    return [
        Span(
            num_tokens=len(row.tokens),
            blocks=row.cross_blocks,
            num_source=row.num_source,
            num_unplaced=0 if (front := fronts[row.slot]) is None else front.num_tokens,
            absent=frozenset() if front is None else front.absent,
        )
        for row in rows
    ]


def _runs_of_last(row: Row, num_tokens: int) -> tuple[tuple[int, int], ...]:
    """(slot, tokens) of the row's last tokens; those before the row's adapter acts are the base's."""
    first = row.start + len(row.tokens) - num_tokens
    return acting_runs(row.slot, num_tokens, row.active_from - first)


def source_extents(rows: Sequence[Row], lengths: Sequence[int], widths: Sequence[int]) -> Iterator[Extent]:
    """Where an encoder's tokens stand: `lengths` with their soft prompts, `widths` with padding behind them too."""
    at = 0
    for row, length, width in zip(rows, lengths, widths, strict=True):
        own = len(row.source)
        yield Extent(slot=row.slot, at=at, num_tokens=length, first=own - length, length=own, is_whole=True)
        at += width


def _target_extents(rows: Sequence[Row]) -> Iterator[Extent]:
    at = 0
    for row in rows:
        first, last = row.prompt
        yield Extent.of_prompt(row.slot, at, len(row.tokens), first=row.start - first, length=last - first)
        at += len(row.tokens)
