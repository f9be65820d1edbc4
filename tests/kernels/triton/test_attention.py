"""The attention kernel: a row's result is exact, has the same bits in any batch, and comes from its own positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.triton.interpreter import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

from peft_serve.kernels.triton.attention import TiledAttention
from peft_serve.kernels.triton.attention_terms import Memory, Scores
from peft_serve.kernels.triton.attention_tiles import Reader, Sizes, Tables, lay_out

SIZES = Sizes(narrow=4, wide=16, split=32, most_splits=4, keys=32, align=32)
BLOCK_SIZE = 8
NUM_HEADS, HEAD, GROUP = 3, 16, 3
KERNEL = TiledAttention(SIZES)
Row = tuple[int, int]  # tokens, context in front


@pytest.fixture
def memory() -> Memory:
    torch.manual_seed(0)
    k, v = (torch.randn(60 * BLOCK_SIZE, 1, HEAD, device=DEVICE) for _ in range(2))
    return Memory(keys_PKD=k, values_PKD=v, block_size=BLOCK_SIZE)


def readers(rows: list[Row], first_block: int = 0) -> list[Reader]:
    made, token = [], 0
    for num_tokens, place in rows:
        num_blocks = -(-(place + num_tokens) // BLOCK_SIZE)
        blocks = [*reversed(range(first_block, first_block + num_blocks))]
        made.append(Reader(token=token, num_tokens=num_tokens, place=place, stop=place + num_tokens, blocks=blocks))
        token, first_block = token + num_tokens, first_block + num_blocks
    return made


def tables_of(made: list[Reader], window: int | None = None) -> Tables:
    return Tables(lay_out(made, group=GROUP, sizes=SIZES, window=window), torch.device(DEVICE))


def place_of(reader: Reader, position: int) -> int:
    return reader.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def queries(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, NUM_HEADS, HEAD, device=DEVICE)


def exact(reader: Reader, q_THD: Tensor, memory: Memory) -> Tensor:
    """Of a row's tokens, in double precision."""
    context = torch.arange(reader.stop)
    places = torch.tensor([place_of(reader, position) for position in range(reader.stop)], device=DEVICE)
    k, v = (x[places, 0].double() for x in (memory.keys_PKD, memory.values_PKD))
    own = q_THD[reader.token : reader.token + reader.num_tokens].double()
    scores = torch.einsum("mhd,cd->hmc", own, k) * 0.25
    hidden = context[None] > reader.place + torch.arange(reader.num_tokens)[:, None]
    shares = scores.masked_fill(hidden.to(DEVICE), float("-inf")).softmax(-1)
    return torch.einsum("hmc,cd->mhd", shares, v).float()


def test_a_row_has_the_same_bits_alone_and_in_a_batch(memory: Memory) -> None:
    made = readers([(1, 0), (1, 100), (9, 3), (1, 40)])
    q = queries(12)
    together = KERNEL.attend(tables_of(made), Scores(scaling=0.25), q, memory)
    for reader in made:
        own = slice(reader.token, reader.token + reader.num_tokens)
        torch.testing.assert_close(together[own], exact(reader, q, memory), atol=2e-6, rtol=1e-5)
        alone = Reader(
            token=0, num_tokens=reader.num_tokens, place=reader.place, stop=reader.stop, blocks=reader.blocks
        )
        assert torch.equal(KERNEL.attend(tables_of([alone]), Scores(scaling=0.25), q[own], memory), together[own])


@pytest.mark.parametrize("window", [None, 5])
def test_nothing_but_a_rows_own_positions_is_read(memory: Memory, window: int | None) -> None:
    made = readers([(1, 37), (6, 11)], first_block=1)
    q, tables = queries(7), tables_of(made, window)
    before = KERNEL.attend(tables, Scores(scaling=0.25), q, memory)
    strange = torch.ones(len(memory.keys_PKD), dtype=torch.bool)
    for reader in made:
        first = 0 if window is None else reader.place + 1 - window
        for position in range(first, reader.stop):
            strange[place_of(reader, position)] = False
    memory.keys_PKD[strange.to(DEVICE)], memory.values_PKD[strange.to(DEVICE)] = float("nan"), float("inf")
    assert torch.equal(KERNEL.attend(tables, Scores(scaling=0.25), q, memory), before)
    memory.keys_PKD[place_of(made[0], 37)] = float("nan")
    after = KERNEL.attend(tables, Scores(scaling=0.25), q, memory)
    assert after[0].isnan().all()
    assert torch.equal(after[1:], before[1:])


def test_tables_take_another_steps_rows_in_place(memory: Memory) -> None:
    """As a captured graph would be given them: the same launch, over the same tensors."""
    first, second = readers([(1, 100), (1, 2)]), readers([(1, 101), (1, 0), (1, 9)], first_block=5)
    tables = tables_of(first)
    numbers = tables.numbers.data_ptr()
    q = queries(3)
    tables.refill(lay_out(second, group=GROUP, sizes=SIZES))
    assert tables.numbers.data_ptr() == numbers
    out = KERNEL.attend(tables, Scores(scaling=0.25), q, memory)
    for reader in second:
        torch.testing.assert_close(out[reader.token : reader.token + 1], exact(reader, q, memory), atol=2e-6, rtol=1e-5)


def test_large_and_small_scores_keep_their_digits(memory: Memory) -> None:
    made = readers([(1, 60)])
    q, tables = queries(1), tables_of(made)
    out = KERNEL.attend(tables, Scores(scaling=0.25), 300 * q, memory)
    torch.testing.assert_close(out, exact(made[0], 300 * q, memory), atol=1e-3, rtol=1e-3)
    plain = KERNEL.attend(tables, Scores(scaling=0.25), q / 100, memory)
    capped = KERNEL.attend(tables, Scores(scaling=0.25, softcap=50.0), q / 100, memory)
    torch.testing.assert_close(capped, plain, atol=1e-7, rtol=1e-6)


def test_what_is_not_covered_is_said_beforehand() -> None:
    def covers(num_heads: int, num_kv_heads: int, head: int, dtype: torch.dtype = torch.float32) -> bool:
        q, k = (torch.empty(2, n, head, dtype=dtype, device=DEVICE) for n in (num_heads, num_kv_heads))
        return KERNEL.covers(q, k)

    assert covers(14, 2, 64)
    assert covers(71, 1, 256, torch.bfloat16)
    assert not covers(14, 4, 64)
    assert not covers(2, 2, 12)
    assert not covers(2, 2, 264)
    assert not covers(130, 1, 64)
    assert not covers(2, 2, 64, torch.float64)
    assert not KERNEL.covers(torch.empty(2, 2, 64, device=DEVICE), torch.empty(2, 2, 64, device=DEVICE).half())
