"""What a captured decode step reads: memory that stays where it is, filled for each step before a replay.

A step has a token a row. Rows up to the size of the memory are idle: they are the base's, they read the padding block,
which is zeros, and what they write goes to a block of their own that no request has. What their logits are is nobody's
concern.

Shapes: `N` rows of the memory, each a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from peft_serve.core import BASE_SLOT, PADDING_BLOCK, Row
from peft_serve.kernels.capture import HeldSegments
from peft_serve.kernels.low_rank import Segments
from peft_serve.kernels.triton.attention_tiles import power_of_two
from peft_serve.model.attention import Kind, Work
from peft_serve.model.held_plan import parts_for
from peft_serve.model.passes import InFront, crossing_of, spans_of
from peft_serve.model.pools import KVPool
from peft_serve.model.ragged import Plan, Span
from peft_serve.model.routing import acting_runs
from peft_serve.model.sending import refill
from peft_serve.model.triton_attention import PlanAttention

_ANY_TOKEN = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """Where keys and values are. `scratch` is a block of the first pool that no request has."""

    own: KVPool
    cross: KVPool | None
    scratch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What steps of one memory have in common: rows, and parts of their contexts (see `parts_for`)."""

    num_rows: int
    parts: int = 1
    cross_parts: int = 0  # 0: the model reads no source


class StepMemory:
    """Memory for steps of one size."""

    def __init__(self, size: Size, pools: Pools, attention: PlanAttention, held: HeldSegments) -> None:
        num_rows, own = size.num_rows, pools.own
        self.size = size
        self._pools, self._held = pools, held
        with torch.inference_mode(False):  # it is written to in either mode
            self._numbers_4N = torch.zeros((4, num_rows), dtype=torch.int64, device=own.device)
            self.keep_N = torch.arange(num_rows, device=own.device)
        self.tokens_N, self.positions_N, writes_N, self.slots_N = self._numbers_4N.unbind(0)
        plan = Plan(spans=(_idle(is_cross=False),) * num_rows, writes_T=writes_N)
        self._own = attention.hold(plan, own, parts=size.parts)
        self.works = {Kind.SELF: Work(plan=plan, pool=own)}
        self._cross = None
        if pools.cross is not None:
            crossing = Plan(spans=(_idle(is_cross=True),) * num_rows)
            self._cross = attention.hold(crossing, pools.cross, parts=size.cross_parts)
            self.works[Kind.CROSS] = Work(plan=crossing, pool=pools.cross)

    @property
    def segments(self) -> Segments:
        """For kernels that are captured."""
        return self._held.segments

    def fill(self, rows: Sequence[Row], in_front: InFront) -> None:
        """From now on, in the order of the current stream, the step has these rows: a token each, sorted by slot."""
        assert all(len(row.tokens) == 1 for row in rows), "a row that decodes has one token"
        num_idle, block_size = self.size.num_rows - len(rows), self._pools.own.block_size
        assert num_idle >= 0, "rows fit"
        slots = acting_slots(rows)
        writes = [row.blocks[row.start // block_size] * block_size + row.start % block_size for row in rows]
        refill(
            self._numbers_4N,
            (
                [*(row.tokens[0] for row in rows), *[_ANY_TOKEN] * num_idle],
                [*(row.start - row.num_unplaced for row in rows), *[0] * num_idle],
                [*writes, *(self._pools.scratch * block_size + i % block_size for i in range(num_idle))],
                [*slots, *[BASE_SLOT] * num_idle],
            ),
        )
        self._held.fill(segments_of(slots))
        self._own.fill([*spans_of(rows, in_front), *[_idle(is_cross=False)] * num_idle])
        if self._cross is not None:
            self._cross.fill([*crossing_of(rows, in_front), *[_idle(is_cross=True)] * num_idle])


def acting_slots(rows: Sequence[Row]) -> list[int]:
    """The slot whose adapter acts on each row's token."""
    return [acting_runs(row.slot, 1, row.active_from - row.start)[0][0] for row in rows]


def segments_of(slots: Sequence[int]) -> Segments:
    """The tokens of adapters, neighbours of one slot together."""
    runs, at = [], 0
    for slot, same in groupby(slots):
        first, at = at, at + len(list(same))
        if slot != BASE_SLOT:
            runs.append((slot, first, at))
    return Segments(runs, at)


def size_for(rows: Sequence[Row], pools: Pools, attention: PlanAttention) -> Size:
    """The smallest size for these rows."""
    num_rows, sizes = power_of_two(max(1, len(rows))), attention.sizes
    parts = parts_for([row.start + 1 for row in rows], num_rows, sizes=sizes, block_size=pools.own.block_size)
    if pools.cross is None:
        return Size(num_rows=num_rows, parts=parts)
    sources = [row.num_source for row in rows]
    cross_parts = parts_for(sources, num_rows, sizes=sizes, block_size=pools.cross.block_size)
    return Size(num_rows=num_rows, parts=parts, cross_parts=cross_parts)


def begun_blocks(rows: Sequence[Row], block_size: int) -> list[int]:
    """Blocks that begin a new life with a row's token."""
    return [row.blocks[row.start // block_size] for row in rows if row.start % block_size == 0 and block_size > 1]


def _idle(*, is_cross: bool) -> Span:
    """A row that reads one position of the padding block."""
    return Span(num_tokens=1, blocks=(PADDING_BLOCK,), num_source=1 if is_cross else 0)
