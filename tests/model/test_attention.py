"""The batched attention gives what the slow one gives, row by row and token by token."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from peft_serve.model.attend import Terms, attend_cached, attend_fresh, attend_reference
from peft_serve.model.attention import Kind, Place, RaggedAttention, Work
from peft_serve.model.pools import KVPool, KVShape
from peft_serve.model.ragged import Front, Plan, RelativeBias, SlopeBias, Span, plan_cross, plan_self, plan_source

CPU = torch.device("cpu")
BLOCK_SIZE = 4
HEAD_DIM = 8
NUM_HEADS = 4


def bias() -> RelativeBias:
    return RelativeBias(torch.randn(NUM_HEADS, 11), 5)


TERMS = {
    "plain": lambda: Terms(scaling=0.5),
    "window": lambda: Terms(scaling=0.5, window=3),
    "softcap": lambda: Terms(scaling=0.5, softcap=2.0),
    "softcap and window": lambda: Terms(scaling=0.5, softcap=2.0, window=3),
    "relative bias": lambda: Terms(scaling=1.0, bias=bias()),
    "sinks": lambda: Terms(scaling=0.5, window=5, sinks_H=torch.randn(NUM_HEADS)),
    "sinks and cap": lambda: Terms(scaling=0.5, softcap=2.0, sinks_H=torch.randn(NUM_HEADS)),
    "slopes": lambda: Terms(scaling=0.5, bias=SlopeBias(torch.rand(NUM_HEADS), divisor=2.0)),
}


def random_spans(make: random.Random, count: int, *, is_long: bool = False) -> list[Span]:
    """Rows of every kind: decode, first chunk, later chunk; their blocks are shuffled over the pool."""
    spans = []
    free = list(range(1, 200 if not is_long else 1200))
    make.shuffle(free)
    for _ in range(count):
        start = make.choice([0, 0, make.randint(1, 30), 700 if is_long else 5])
        num_tokens = make.choice([1, 1, 2, make.randint(1, 12)])
        count_blocks = -(-(start + num_tokens) // BLOCK_SIZE)
        spans.append(Span(num_tokens=num_tokens, start=start, blocks=tuple(free[:count_blocks])))
        del free[:count_blocks]
    return spans


def filled_pool(num_kv_heads: int, num_blocks: int = 200) -> KVPool:
    """A pool of random pasts, as finite as a live one, with a clean padding block."""
    shape = KVShape(num_layers=2, num_heads=num_kv_heads, head_dim=HEAD_DIM)
    pool = KVPool(shape, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=torch.float32, device=CPU)
    for layer in range(2):
        places = torch.arange(BLOCK_SIZE, num_blocks * BLOCK_SIZE)
        size = (len(places), num_kv_heads, HEAD_DIM)
        pool.write(layer, places, torch.randn(size), torch.randn(size))
    return pool


def step_tensors(num_tokens: int, num_keys: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    key = (num_keys, num_kv_heads, HEAD_DIM)
    return torch.randn(num_tokens, NUM_HEADS, HEAD_DIM), torch.randn(key), torch.randn(key)


def both(plan: Plan, num_keys: int, terms: Terms, pool: KVPool | None, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    q, k, v = step_tensors(sum(s.num_tokens for s in plan.spans), num_keys, num_kv_heads)
    if pool is not None and plan.writes_T is not None:
        pool.write(1, plan.writes_T, k, v)
    fast = torch.full_like(q, float("nan"))
    for fresh in plan.fresh:
        fast[fresh.where] = attend_fresh(fresh, q, k, v, 1, terms)
    for cached in plan.cached:
        assert pool is not None
        fast[cached.where] = attend_cached(cached, q, pool, 1, terms)
    return fast, attend_reference(plan, q, k, v, pool, 1, terms)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("terms", TERMS)
def test_self_attention_equals_the_reference(terms: str, num_kv_heads: int) -> None:
    torch.manual_seed(0)
    for seed in range(6):
        spans = random_spans(random.Random(seed), 9)
        plan = plan_self(spans, block_size=BLOCK_SIZE, device=CPU)
        num_tokens = sum(s.num_tokens for s in spans)
        fast, slow = both(plan, num_tokens, TERMS[terms](), filled_pool(num_kv_heads), num_kv_heads)
        torch.testing.assert_close(fast, slow, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("terms", TERMS)
def test_a_few_rows_at_a_time_are_all_rows_at_once(terms: str) -> None:
    torch.manual_seed(0)
    for seed in range(4):
        plan = plan_self(random_spans(random.Random(seed), 9), block_size=BLOCK_SIZE, device=CPU)
        q, k, v = step_tensors(*(2 * [sum(s.num_tokens for s in plan.spans)]), 2)
        pool, asked = filled_pool(2), TERMS[terms]()
        assert plan.writes_T is not None
        pool.write(1, plan.writes_T, k, v)
        for cached in plan.cached:
            row_bytes = len(cached.blocks) // cached.num_rows * pool.bytes_per_block // torch.get_num_threads()
            whole = attend_cached(cached, q, pool, 1, asked)
            for num_rows in (0, 1, 2):
                few = attend_cached(cached, q, pool, 1, asked, chunk_bytes=num_rows * row_bytes + 1)
                torch.testing.assert_close(few, whole, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("terms", TERMS)
def test_positions_that_count_for_no_token_are_read_by_all_of_them_or_by_none(terms: str) -> None:
    torch.manual_seed(0)
    for seed in range(6):
        make = random.Random(seed)
        spans = [
            replace(
                span, num_unplaced=make.randint(0, min(span.start, 6)), absent=frozenset(make.choice([(), (0,), (1,)]))
            )
            for span in random_spans(make, 9)
        ]
        plan = plan_self(spans, block_size=BLOCK_SIZE, device=CPU)
        num_tokens = sum(s.num_tokens for s in spans)
        fast, slow = both(plan, num_tokens, TERMS[terms](), filled_pool(2), 2)
        torch.testing.assert_close(fast, slow, atol=2e-6, rtol=1e-5)


def test_a_window_does_not_reach_what_carries_no_position() -> None:
    """A token far behind reads the first two positions as if they were next to it."""
    torch.manual_seed(0)
    pool, terms = filled_pool(NUM_HEADS), Terms(scaling=0.5, window=2)
    far = Span(num_tokens=1, start=9, blocks=(3, 4, 5), num_unplaced=2)
    near = Span(num_tokens=1, start=3, blocks=(6,), num_unplaced=2)
    for layer_k, layer_v in (pool.layer(layer) for layer in range(2)):
        for pooled in (layer_k, layer_v):
            pooled[24:26] = pooled[12:14]  # what is in front
            pooled[26] = pooled[12 + 8]  # the one position before
    q, k, v = (x.expand(2, -1, -1).contiguous() for x in step_tensors(1, 1, NUM_HEADS))
    plan = plan_self([far, near], block_size=BLOCK_SIZE, device=CPU)
    assert plan.writes_T is not None
    pool.write(1, plan.writes_T, k, v)
    out = attend_reference(plan, q, k, v, pool, 1, terms)
    torch.testing.assert_close(out[0], out[1])
    fast = torch.empty_like(q)
    for cached in plan.cached:
        fast[cached.where] = attend_cached(cached, q, pool, 1, terms)
    torch.testing.assert_close(fast, out)


@pytest.mark.parametrize("terms", ["plain", "relative bias"])
@pytest.mark.parametrize("absent", [(), (0,), (1,)])
def test_source_attention_behind_fronts_equals_the_reference(terms: str, absent: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    lengths = [3, 1, 7, 3, 7, 3]
    size = (2, NUM_HEADS, 5, HEAD_DIM)
    front = Front(torch.randn(size), torch.randn(size), advances_positions=False, absent=frozenset(absent))
    plan = plan_source(lengths, device=CPU, fronts=[front, None, front, front, None, None])
    fast, slow = both(plan, sum(lengths), TERMS[terms](), None, NUM_HEADS)
    torch.testing.assert_close(fast, slow, atol=2e-6, rtol=1e-5)


def test_rows_of_very_different_contexts_are_not_padded_to_one_length() -> None:
    torch.manual_seed(0)
    spans = random_spans(random.Random(4), 12, is_long=True)
    plan = plan_self(spans, block_size=BLOCK_SIZE, device=CPU)
    decoding = [c for c in plan.cached if c.num_tokens == 1]
    assert len(decoding) > 1
    num_tokens = sum(s.num_tokens for s in spans)
    fast, slow = both(plan, num_tokens, Terms(scaling=0.5), filled_pool(2, 1200), 2)
    torch.testing.assert_close(fast, slow, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("terms", ["plain", "relative bias"])
def test_source_attention_equals_the_reference(terms: str) -> None:
    torch.manual_seed(0)
    lengths = [3, 1, 7, 3, 7, 12]
    fast, slow = both(plan_source(lengths, device=CPU), sum(lengths), TERMS[terms](), None, NUM_HEADS)
    torch.testing.assert_close(fast, slow, atol=2e-6, rtol=1e-5)


def test_cross_attention_equals_the_reference_for_new_and_old_rows() -> None:
    torch.manual_seed(0)
    spans = [
        Span(num_tokens=1, blocks=(9, 4, 7), num_source=11),
        Span(num_tokens=3, blocks=(2, 11), num_source=5),
        Span(num_tokens=1, blocks=(3,), num_source=2),
        Span(num_tokens=3, blocks=(12, 13), num_source=8),
    ]
    new = [Span(num_tokens=5, blocks=(2, 11)), Span(num_tokens=2, blocks=(3,))]
    plan = plan_cross(spans, new, block_size=BLOCK_SIZE, device=CPU)
    fast, slow = both(plan, 7, Terms(scaling=0.5), filled_pool(NUM_HEADS), NUM_HEADS)
    torch.testing.assert_close(fast, slow, atol=2e-6, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 14))
def test_a_plan_puts_every_token_into_one_group_and_writes_it_to_its_place(seed: int, count: int) -> None:
    spans = random_spans(random.Random(seed), count)
    plan = plan_self(spans, block_size=BLOCK_SIZE, device=CPU)
    num_tokens = sum(s.num_tokens for s in spans)
    line = torch.arange(num_tokens)
    seen = torch.cat([line[g.where] for g in (*plan.fresh, *plan.cached)])
    assert sorted(seen.tolist()) == line.tolist()
    expected = [s.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for s in spans for p in range(s.start, s.stop)]
    assert plan.writes_T is not None
    assert plan.writes_T.tolist() == expected
    for block in plan.clears:
        owner = next(s for s in spans if block in s.blocks)
        first = owner.blocks.index(block) * BLOCK_SIZE
        assert owner.start <= first < owner.stop < first + BLOCK_SIZE


def test_what_a_stranger_left_in_a_block_does_not_come_through_the_mask() -> None:
    pool = filled_pool(2)
    nans = torch.full((2, 2, BLOCK_SIZE * 2, HEAD_DIM), float("nan"))
    pool.store((5, 6), nans, nans)
    plan = plan_self([Span(num_tokens=2, start=3, blocks=(8, 5))], block_size=BLOCK_SIZE, device=CPU)
    pool.clear(plan.clears)
    fast, _ = both(plan, 2, Terms(scaling=0.5), pool, 2)
    assert torch.isfinite(fast).all()


def test_each_kind_of_module_is_given_its_own_work() -> None:
    """The library's call, on a module in `places` and on one that only has a `layer_idx`."""

    class Decoder(nn.Module):
        layer_idx = 1

    torch.manual_seed(0)
    encoder, decoder = nn.Identity(), Decoder()
    attention = RaggedAttention({encoder: Place(kind=Kind.SOURCE, layer=0)})
    pool = filled_pool(2)
    spans = random_spans(random.Random(1), 5)
    num_tokens = sum(s.num_tokens for s in spans)
    work = {
        Kind.SELF: Work(plan=plan_self(spans, block_size=BLOCK_SIZE, device=CPU), pool=pool),
        Kind.SOURCE: Work(plan=plan_source([num_tokens], device=CPU)),
    }
    q, k, v = (x.transpose(0, 1)[None] for x in step_tensors(num_tokens, num_tokens, 2))
    answers = {}
    for is_reference in (False, True):
        attention.is_reference = is_reference
        with attention.running(work):
            for module in (encoder, decoder):
                out, weights = attention._attend(module, q, k, v, None, dropout=0.0, is_causal=True)
                assert weights is None
                assert out.shape == (1, num_tokens, NUM_HEADS, HEAD_DIM)
                answers[module, is_reference] = out
    for module in (encoder, decoder):
        torch.testing.assert_close(answers[module, False], answers[module, True], atol=2e-6, rtol=1e-5)
    assert not torch.allclose(answers[encoder, False], answers[decoder, False])
