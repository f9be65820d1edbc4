"""The passes through the model that make up a step.

Owns nothing but references: it turns rows into plans, tells the adapted sites which tokens are whose, and
calls the family. It knows no sampling and no adapter beyond its slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from peft_serve.core import Row
from peft_serve.model.attention import Kind, Work
from peft_serve.model.base import ResidentBase
from peft_serve.model.families.family import ReadsPrompts, ReadsSources
from peft_serve.model.pools import KVPool
from peft_serve.model.ragged import Span, plan_cross, plan_self, plan_source
from peft_serve.model.routing import Stream, acting_runs


class Passes:
    """Encode, decode, and read a soft prompt, over rows side by side."""

    def __init__(self, base: ResidentBase, *, pool: KVPool, cross_pool: KVPool | None) -> None:
        self._base = base
        self._pool = pool
        self._cross_pool = cross_pool

    def encode(self, rows: Sequence[Row], prompt_of: Callable[[int], Tensor | None]) -> Tensor | None:
        """Encode the rows that bring a source, each behind its slot's soft prompt: [1, S, d], or None."""
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
            prompt = prompt_of(row.slot)
            whole = part if prompt is None else family.behind(prompt, part)
            assert len(whole) == row.num_source, f"{row.request}: num_source does not count its soft prompt"
            parts.append(whole)
            lengths.append(len(whole))
        self._route(Stream.SOURCE, zip((row.slot for row in new), lengths, strict=True))
        positions = self._ids(p for n in lengths for p in range(n))
        work = {Kind.SOURCE: Work(plan=plan_source(lengths, device=self._base.device))}
        with self._base.runs.attention.running(work):
            return family.encode(torch.cat(parts), positions)

    def decode(self, rows: Sequence[Row], source: Tensor | None, keep: Mapping[int, int]) -> Tensor | None:
        """Run the decoder over all rows; float32 logits [N, V] after the last `keep[i]` tokens of row i.

        `source` is what `encode` gave for these rows. None if nothing is kept.
        """
        self._route(Stream.TARGET, (run for row in rows for run in _runs_of_last(row, len(row.tokens))))
        self._route(Stream.HEAD, (run for i, row in enumerate(rows) for run in _runs_of_last(row, keep.get(i, 0))))
        tokens = self._ids(t for row in rows for t in row.tokens)
        positions = self._ids(row.start + i for row in rows for i in range(len(row.tokens)))
        kept: list[int] = []
        at = 0
        for i, row in enumerate(rows):
            at += len(row.tokens)
            kept.extend(range(at - keep.get(i, 0), at))
        with self._base.runs.attention.running(self._works(rows)):
            if not kept:
                self._base.runs.hidden(tokens, positions, source)
                return None
            return self._base.runs.logits(tokens, positions, self._ids(kept), source).float()

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

    def _works(self, rows: Sequence[Row]) -> dict[Kind, Work]:
        device = self._base.device
        spans = [Span(num_tokens=len(row.tokens), start=row.start, blocks=row.blocks) for row in rows]
        plan = plan_self(spans, block_size=self._pool.block_size, device=device)
        self._pool.clear(plan.clears)
        works = {Kind.SELF: Work(plan=plan, pool=self._pool)}
        if self._cross_pool is not None:
            crossing = [
                Span(num_tokens=len(row.tokens), blocks=row.cross_blocks, num_source=row.num_source) for row in rows
            ]
            new = [Span(num_tokens=row.num_source, blocks=row.cross_blocks) for row in rows if row.source]
            cross = plan_cross(crossing, new, block_size=self._cross_pool.block_size, device=device)
            self._cross_pool.clear(cross.clears)
            works[Kind.CROSS] = Work(plan=cross, pool=self._cross_pool)
        return works

    def _route(self, stream: Stream, counts: Iterable[tuple[int, int]]) -> None:
        self._base.adapted.route(stream, counts)

    def _ids(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.long, device=self._base.device)


def _runs_of_last(row: Row, num_tokens: int) -> tuple[tuple[int, int], ...]:
    """(slot, tokens) of the row's last tokens; those before the row's adapter acts are the base's."""
    first = row.start + len(row.tokens) - num_tokens
    return acting_runs(row.slot, num_tokens, row.active_from - first)
