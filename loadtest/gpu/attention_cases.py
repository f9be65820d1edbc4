"""What attention is tried on: rows of every kind with random keys and values, and the terms that families ask for."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor

from peft_serve.model.attend import Terms
from peft_serve.model.pools import KVPool, KVShape
from peft_serve.model.ragged import (
    Front,
    Plan,
    RelativeBias,
    SlopeBias,
    Span,
    plan_cross,
    plan_self,
    plan_source,
)

BLOCK_SIZE: Final = 16
CPU: Final = torch.device("cpu")
LAYER: Final = 1  # of two: the other one is where nothing in front is absent
_FRONT: Final = 5

Rows = Literal["decode", "far", "mixed", "unplaced", "cross", "encoder", "front"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Rows, heads, and what becomes of scores. `bias` and `has_sinks` name tensors that are drawn."""

    name: str
    rows: Rows = "mixed"
    heads: int = 8
    kv_heads: int = 2
    head: int = 64
    window: int | None = None
    softcap: float | None = None
    bias: Literal["", "distance", "slopes"] = ""
    has_sinks: bool = False

    def spans(self, make: random.Random, *, is_quick: bool) -> list[Span]:
        """The rows of a step, their blocks shuffled over the pool."""
        if self.rows in ("encoder", "front"):
            front = self._front(make) if self.rows == "front" else None
            return [Span(num_tokens=n, front=front if n % 2 else None) for n in (3, 17, 40)[: 2 if is_quick else 3]]
        far, lengths = 3000 if self.rows == "far" else 100, [1, 1, 1, 1]
        if self.rows in ("mixed", "unplaced", "cross"):
            lengths = [1, 7] if is_quick else [1, 1, 1, 2, 7, 33, 100]
        starts = [make.randint(5, far) if n == 1 or i % 2 else 0 for i, n in enumerate(lengths)]
        return self._placed(make, starts, lengths)

    def _placed(self, make: random.Random, starts: Sequence[int], lengths: Sequence[int]) -> list[Span]:
        sources = [make.randint(1, 90) if self.rows == "cross" else 0 for _ in lengths]
        counts = [-(-(s or start + n) // BLOCK_SIZE) for s, start, n in zip(sources, starts, lengths, strict=True)]
        free = list(range(1, 1 + sum(counts)))
        make.shuffle(free)
        spans = []
        for start, length, source, count in zip(starts, lengths, sources, counts, strict=True):
            blocks, free = tuple(free[:count]), free[count:]
            span = Span(num_tokens=length, start=0 if source else start, blocks=blocks, num_source=source)
            if self.rows == "unplaced" and start:
                span = replace(span, num_unplaced=min(start, _FRONT), absent=frozenset(make.choice([(), (LAYER,)])))
            spans.append(span)
        return spans

    def _front(self, make: random.Random) -> Front:
        generator = torch.Generator().manual_seed(make.randrange(1 << 30))
        size = (2, self.kv_heads, _FRONT, self.head)
        keys, values = (torch.randn(size, generator=generator) for _ in range(2))
        return Front(keys, values, absent=frozenset(make.choice([(), (0,)])))

    def terms(self, generator: torch.Generator) -> Terms:
        """In float32, on the CPU."""
        bias: RelativeBias | SlopeBias | None = None
        if self.bias == "distance":
            bias = RelativeBias(torch.randn(self.heads, 2 * 128 + 1, generator=generator), 128)
        elif self.bias == "slopes":
            bias = SlopeBias(0.02 * torch.rand(self.heads, generator=generator))
        sinks = torch.randn(self.heads, generator=generator) if self.has_sinks else None
        return Terms(scaling=self.head**-0.5, window=self.window, softcap=self.softcap, bias=bias, sinks_H=sinks)


CASES: Final = (
    Case(name="rows of all lengths"),
    Case(name="decode", rows="decode", heads=32, kv_heads=8, head=128),
    Case(name="decode far into the context", rows="far", heads=32, kv_heads=8, head=128),
    Case(name="a window (Mistral)", window=20),
    Case(name="a window and a cap (Gemma-2)", window=20, softcap=5.0, head=256, heads=4),
    Case(name="sinks (gpt-oss)", window=40, has_sinks=True, heads=16, kv_heads=2),
    Case(name="a bias by distance (T5)", bias="distance", kv_heads=8),
    Case(name="slopes (ALiBi)", bias="slopes", kv_heads=8, head=80),
    Case(name="one key head, heads of 256 (Gemma)", kv_heads=1, head=256),
    Case(name="positions in front that count for none", rows="unplaced", window=20),
    Case(name="over an encoded source", rows="cross", kv_heads=8),
    Case(name="an encoder", rows="encoder", kv_heads=8),
    Case(name="an encoder with keys in front", rows="front", kv_heads=8),
    Case(name="heads of 8, half of what a tensor core takes", head=8, kv_heads=4),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """One step of a case on a device."""

    plan: Plan
    pool: KVPool | None
    q: Tensor
    k: Tensor
    v: Tensor
    terms: Terms


class Made:
    """The numbers of a case, the same for every device; rounded to `dtype` once."""

    def __init__(self, case: Case, dtype: torch.dtype, *, seed: int = 0, is_quick: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.case = case
        self.spans = case.spans(random.Random(seed), is_quick=is_quick)
        num_tokens = sum(span.num_tokens for span in self.spans)
        self.num_blocks = 1 + max((block for span in self.spans for block in span.blocks), default=1)
        places, key = self.num_blocks * BLOCK_SIZE, (case.kv_heads, case.head)
        sizes = ((num_tokens, case.heads, case.head), *((num_tokens, *key),) * 2, *((places, *key),) * 2)
        drawn = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
        self.tokens, self.past = drawn[:3], drawn[3:]
        self.terms = case.terms(generator)

    def on(self, device: torch.device, dtype: torch.dtype, spans: Sequence[Span] | None = None) -> Given:
        """The step, or one of some of its rows, on a device and in a type; the past is that of the whole step."""
        rows = list(self.spans if spans is None else spans)
        q, k, v = (self._of_rows(each, rows).to(device=device, dtype=dtype) for each in self.tokens)
        pool = None if self.case.rows in ("encoder", "front") else self._pool(device, dtype)
        plan = self._plan([_moved(span, device, dtype) for span in rows], device)
        if pool is not None and plan.writes_T is not None:
            pool.write(LAYER, plan.writes_T, k, v)
        return Given(plan=plan, pool=pool, q=q, k=k, v=v, terms=self._terms(device))

    def _plan(self, spans: list[Span], device: torch.device) -> Plan:
        if self.case.rows == "cross":
            return plan_cross(spans, [], block_size=BLOCK_SIZE, device=device)
        if self.case.rows in ("encoder", "front"):
            lengths, fronts = [span.num_tokens for span in spans], [span.front for span in spans]
            return plan_source(lengths, device=device, fronts=fronts)
        return plan_self(spans, block_size=BLOCK_SIZE, device=device)

    def _pool(self, device: torch.device, dtype: torch.dtype) -> KVPool:
        shape = KVShape(num_layers=2, num_heads=self.case.kv_heads, head_dim=self.case.head)
        pool = KVPool(shape, num_blocks=self.num_blocks, block_size=BLOCK_SIZE, dtype=dtype, device=device)
        k, v = (each[BLOCK_SIZE:].to(device=device, dtype=dtype) for each in self.past)
        pool.write(LAYER, torch.arange(BLOCK_SIZE, self.num_blocks * BLOCK_SIZE, device=device), k, v)
        return pool

    def _of_rows(self, each: Tensor, rows: list[Span]) -> Tensor:
        parts = torch.split(each, [span.num_tokens for span in self.spans])
        return torch.cat([part for span, part in zip(self.spans, parts, strict=True) if span in rows])

    def _terms(self, device: torch.device) -> Terms:
        bias, sinks = self.terms.bias, self.terms.sinks_H
        if isinstance(bias, RelativeBias):
            bias = replace(bias, table_HX=bias.table_HX.to(device))
        elif isinstance(bias, SlopeBias):
            bias = replace(bias, slopes_H=bias.slopes_H.to(device))
        return replace(self.terms, bias=bias, sinks_H=None if sinks is None else sinks.to(device))


def _moved(span: Span, device: torch.device, dtype: torch.dtype) -> Span:
    if span.front is None:
        return span
    keys, values = (each.to(device=device, dtype=dtype) for each in (span.front.keys_LHPD, span.front.values_LHPD))
    return replace(span, front=replace(span.front, keys_LHPD=keys, values_LHPD=values))
