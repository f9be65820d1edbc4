"""Whole plans by the Triton kernel give what the slow attention gives, row by row and token by token."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from peft_serve.model.attend import Terms, attend_reference
from peft_serve.model.attention import Kind, RaggedAttention, Work
from peft_serve.model.base import ResidentBase
from peft_serve.model.pools import KVPool, KVShape
from peft_serve.model.ragged import Front, Plan, RelativeBias, SlopeBias, Span, plan_cross, plan_self, plan_source
from tests.kernels.triton.interpreter import DEVICE
from tests.model.driver import Driver, Job
from tests.model.tiny_models import t5_sizes

pytest.importorskip("triton")

from peft_serve.kernels.triton.attention import TiledAttention
from peft_serve.kernels.triton.attention_tiles import Sizes
from peft_serve.model.triton_attention import PlanAttention

NUM_BLOCKS = 100
SMALL = Sizes(narrow=8, wide=16, split=32, most_splits=4, keys=32, align=32)
"""So that short contexts have several parts, and chunks several tiles."""


@dataclass(frozen=True)
class Heads:
    """A model's heads."""

    queries: int
    keys: int
    size: int
    block: int = 8

    def random(self, *size: int) -> Tensor:
        return torch.randn(*size, self.size, device=DEVICE)


GROUPED = Heads(queries=6, keys=2, size=24)
ONE = Heads(queries=3, keys=1, size=16)

SELF: dict[str, tuple[Heads, Callable[[Heads], Terms]]] = {
    "plain": (GROUPED, lambda _: Terms(scaling=0.3)),
    "window, one key head": (Heads(queries=5, keys=1, size=8, block=16), lambda _: Terms(scaling=0.3, window=7)),
    "sinks, every key head its own": (
        Heads(queries=2, keys=2, size=128),
        lambda h: Terms(scaling=0.1, sinks_H=sinks(h)),
    ),
    "softcap and window": (ONE, lambda _: Terms(scaling=0.5, softcap=2.0, window=33)),
    "sinks, cap and window": (ONE, lambda h: Terms(scaling=0.3, softcap=3.0, window=21, sinks_H=sinks(h))),
    "relative bias": (ONE, lambda h: Terms(scaling=1.0, bias=by_distance(h))),
    "slopes": (ONE, lambda h: Terms(scaling=0.5, bias=slopes(h, torch.float32))),
    "slopes in bfloat16": (ONE, lambda h: Terms(scaling=0.5, bias=slopes(h, torch.bfloat16))),
}


def sinks(heads: Heads) -> Tensor:
    return torch.randn(heads.queries, device=DEVICE)


def by_distance(heads: Heads) -> RelativeBias:
    return RelativeBias(torch.randn(heads.queries, 11, device=DEVICE), 5)


def slopes(heads: Heads, dtype: torch.dtype) -> SlopeBias:
    """Every other number of a table, as models give them."""
    return SlopeBias((torch.rand(heads.queries, 2, device=DEVICE) / 4).to(dtype)[:, 1], divisor=2.0)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def filled_pool(heads: Heads, dtype: torch.dtype = torch.float32) -> KVPool:
    """Random pasts; what belongs to no row is not even a number."""
    shape = KVShape(num_layers=2, num_heads=heads.keys, head_dim=heads.size)
    pool = KVPool(shape, num_blocks=NUM_BLOCKS, block_size=heads.block, dtype=dtype, device=torch.device(DEVICE))
    for tensor in (x for layer in range(2) for x in pool.layer(layer)):
        tensor.fill_(float("nan"))
    return pool


def fill(pool: KVPool, spans: Sequence[Span]) -> None:
    """The contexts of the rows become numbers."""
    for span in spans:
        for position in range(span.num_source or span.stop):
            place = span.blocks[position // pool.block_size] * pool.block_size + position % pool.block_size
            for tensor in (x for layer in range(2) for x in pool.layer(layer)):
                tensor[place] = torch.randn(tensor.shape[1:], device=DEVICE)


def random_spans(make: random.Random, block_size: int) -> list[Span]:
    """Decode, first and later chunks, short and long contexts; their blocks lie anywhere."""
    free = list(range(1, NUM_BLOCKS))
    make.shuffle(free)
    spans = []
    for num_tokens, start in ((1, make.randint(50, 60)), (2, make.randint(33, 40)), (8, 0), (7, make.randint(9, 20))):
        count = -(-(start + num_tokens) // block_size)
        blocks, free = tuple(free[: count + 1]), free[count + 1 :]  # one more than is read
        spans.append(Span(num_tokens=num_tokens, start=start, blocks=blocks))
    make.shuffle(spans)
    return spans


def both(
    plan: Plan, heads: Heads, terms: Terms, pool: KVPool | None, *, num_keys: int | None = None, layer: int = 1
) -> tuple[Tensor, Tensor]:
    """The kernel's and the slow attention's, for queries as rotary embeddings leave them."""
    num_tokens = sum(span.num_tokens for span in plan.spans)
    dtype = torch.float32 if pool is None else pool.layer(layer)[0].dtype
    q = heads.random(heads.queries, num_tokens).to(dtype).transpose(0, 1)
    k, v = (heads.random(heads.keys, num_tokens if num_keys is None else num_keys).to(dtype) for _ in range(2))
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    if pool is not None and plan.writes_T is not None:
        pool.write(layer, plan.writes_T, k, v)
    fast = PlanAttention(TiledAttention(SMALL)).attend(plan, pool, q, k, v, layer, terms)
    assert fast is not None, "the kernel covers this"
    return fast, attend_reference(plan, q, k, v, pool, layer, terms)


def assert_same(pair: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(*pair, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("name", SELF)
def test_self_attention_equals_the_reference(name: str) -> None:
    heads, terms = SELF[name]
    spans = random_spans(random.Random(name), heads.block)
    pool = filled_pool(heads)
    fill(pool, spans)
    plan = plan_self(spans, block_size=heads.block, device=pool.device)
    assert_same(both(plan, heads, terms(heads), pool))


@pytest.mark.parametrize("name", ["window, one key head", "relative bias"])
def test_positions_that_count_for_no_token_are_read_by_all_of_them_or_by_none(name: str) -> None:
    heads, terms = SELF[name]
    spans = random_spans(random.Random(name), heads.block)
    leads = iter([(9, frozenset({1})), (5, frozenset({0})), (3, frozenset())])
    spans = [
        replace(s, **dict(zip(("num_unplaced", "absent"), next(leads), strict=True))) if s.start else s for s in spans
    ]
    pool = filled_pool(heads)
    fill(pool, spans)
    plan = plan_self(spans, block_size=heads.block, device=pool.device)
    assert_same(both(plan, heads, terms(heads), pool))


@pytest.mark.parametrize(("dtype", "room"), [(torch.bfloat16, 2.0**-6), (torch.float16, 2.0**-9)])
def test_half_precision_is_as_near_as_its_digits(dtype: torch.dtype, room: float) -> None:
    spans = random_spans(random.Random(7), ONE.block)
    pool = filled_pool(ONE, dtype)
    fill(pool, spans)
    plan = plan_self(spans, block_size=ONE.block, device=pool.device)
    fast, slow = both(plan, ONE, Terms(scaling=0.2), pool)
    assert fast.dtype == dtype
    torch.testing.assert_close(fast, slow, atol=room, rtol=room)


def test_cross_attention_equals_the_reference_for_new_and_old_rows() -> None:
    spans = [
        Span(num_tokens=1, blocks=(9, 4, 7), num_source=21, num_unplaced=3, absent=frozenset({1})),
        Span(num_tokens=3, blocks=(2, 11), num_source=13),
        Span(num_tokens=1, blocks=(3,), num_source=2, num_unplaced=1, absent=frozenset({0})),
        Span(num_tokens=6, blocks=(12, 13), num_source=16),
    ]
    new = [Span(num_tokens=13, blocks=(2, 11)), Span(num_tokens=1, start=1, blocks=(3,))]
    pool = filled_pool(ONE)
    fill(pool, spans)
    plan = plan_cross(spans, new, block_size=ONE.block, device=pool.device)
    assert_same(both(plan, ONE, Terms(scaling=0.3), pool, num_keys=14))


@pytest.mark.parametrize(("name", "layer"), [("plain", None), ("relative bias", 0), ("relative bias", 1)])
def test_source_attention_equals_the_reference_with_and_without_fronts(name: str, layer: int | None) -> None:
    heads, terms = SELF[name]
    here, elsewhere = (
        Front(heads.random(2, heads.keys, n), heads.random(2, heads.keys, n), advances_positions=False, absent=absent)
        for n, absent in ((5, frozenset[int]()), (3, frozenset({1})))
    )
    fronts = None if layer is None else [here, None, elsewhere, here]
    plan = plan_source([3, 1, 7, 19], device=torch.device(DEVICE), fronts=fronts)
    assert_same(both(plan, heads, terms(heads), None, layer=layer or 0))


def test_what_is_not_covered_is_left_to_others() -> None:
    kernel = PlanAttention(TiledAttention(SMALL))
    pool = filled_pool(GROUPED)
    row = [Span(num_tokens=1, start=3, blocks=(1,))]
    q, k = GROUPED.random(1, GROUPED.queries), GROUPED.random(1, GROUPED.keys)

    def is_covered(plan: Plan, terms: Terms, pool: KVPool | None = pool, q: Tensor = q, k: Tensor = k) -> bool:
        return kernel.attend(plan, pool, q, k, k, 0, terms) is not None

    own = plan_self(row, block_size=GROUPED.block, device=pool.device)
    crossing = plan_cross([replace(row[0], num_source=4)], [], block_size=GROUPED.block, device=pool.device)
    source = plan_source([1], device=pool.device)
    assert is_covered(own, Terms(scaling=1.0))
    assert is_covered(crossing, Terms(scaling=1.0))
    assert is_covered(source, Terms(scaling=1.0), None)
    assert not is_covered(own, Terms(scaling=1.0), q=q.double())
    assert not is_covered(own, Terms(scaling=1.0, bias=RelativeBias(torch.zeros(2, 6).t(), 0)))
    assert not is_covered(crossing, Terms(scaling=1.0, window=3))
    assert not is_covered(crossing, Terms(scaling=1.0, bias=by_distance(GROUPED)))
    assert not is_covered(source, Terms(scaling=1.0, window=3), None)


def test_tables_are_made_once_a_pass() -> None:
    kernel = PlanAttention(TiledAttention(SMALL))
    pool = filled_pool(GROUPED)
    spans = [Span(num_tokens=1, start=20, blocks=(1, 2, 3))]
    fill(pool, spans)
    plan = plan_self(spans, block_size=GROUPED.block, device=pool.device)
    q, k = GROUPED.random(1, GROUPED.queries), GROUPED.random(1, GROUPED.keys)
    for window in (None, 5):
        for layer in (0, 1):
            kernel.attend(plan, pool, q, k, k, layer, Terms(scaling=1.0, window=window))
    assert len(kernel._tables) == 2
    kernel.forget()
    assert not kernel._tables


class Counting:
    """The kernel, and how often it served."""

    def __init__(self) -> None:
        self.num_served = self.num_refused = 0
        self._own = PlanAttention(TiledAttention(Sizes(split=16, keys=16, align=16)))

    def forget(self) -> None:
        self._own.forget()

    def attend(self, *args: Any) -> Tensor | None:
        out = self._own.attend(*args)
        self.num_served += out is not None
        self.num_refused += out is None
        return out


class Answering:
    """A kernel that gives what it is told to."""

    def __init__(self) -> None:
        self.answer: Tensor | None = None
        self.num_passes = 0

    def forget(self) -> None:
        self.num_passes += 1

    def attend(self, *_: Any) -> Tensor | None:
        return self.answer


def test_what_the_kernel_gives_is_taken_and_the_rest_is_left_to_torch() -> None:
    attention, kernel, module = RaggedAttention({}), Answering(), nn.Identity()
    attention.whole = kernel
    plan = plan_source([2, 3], device=torch.device("cpu"))
    q = torch.randn(5, 2, 8)
    work = Work(plan=plan)
    with attention.running({Kind.SOURCE: work}):
        kernel.answer = torch.randn(5, 2, 8)
        assert attention.run(module, work, 0, q, q, q, Terms(scaling=1.0)) is kernel.answer
        kernel.answer = None
        out = attention.run(module, work, 0, q, q, q, Terms(scaling=1.0))
        torch.testing.assert_close(out, attend_reference(plan, q, q, q, None, 0, Terms(scaling=1.0)))
        assert kernel.num_passes == 0
    assert kernel.num_passes == 1


def tiny_t5() -> PreTrainedModel:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(**t5_sizes(d_kv=8, num_heads=2, num_layers=1, num_decoder_layers=1))
    ).eval()


def test_a_model_gives_the_tokens_that_it_gives_without_the_kernel() -> None:
    def outputs(whole: Counting | None) -> list[list[int]]:
        base = ResidentBase(tiny_t5().to(DEVICE), name="tiny")
        base.runs.attention.whole = whole
        jobs = [Job(prompt=(0,), source=tuple(range(20, 38)), num_new=2), Job(prompt=(0, 11), source=(9, 4), num_new=2)]
        Driver(base).finish(jobs, max_chunk=20)
        return [job.output for job in jobs]

    whole = Counting()
    assert outputs(whole) == outputs(None)
    assert whole.num_served > 0
    assert whole.num_refused == 0
