"""Low-rank terms of ids in Triton, by its interpreter: A's columns are looked up, whatever the ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_serve.kernels.low_rank import LooksUp, Segments
from tests.kernels.triton.interpreter import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

from peft_serve.kernels.triton.low_rank import LongRuns, LowRankKernel
from peft_serve.kernels.triton.shrinking import DTYPES

HERE = torch.device(DEVICE)
NUM_IDS, NUM_OUT = 48, 40
RANKS = {1: 1, 2: 8, 3: 17, 9: 64}
ROWS = [(1, 0, 2), (3, 2, 20), (4, 20, 21), (2, 22, 23), (9, 23, 30)]  # slot 4 has nothing here
ROOM = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [ROWS, [(3, 0, 70), (9, 70, 72)]], ids=["short", "long"])
def test_every_token_gets_the_column_of_its_adapter(dtype: torch.dtype, rows: list[tuple[int, int, int]]) -> None:
    make, num_tokens = torch.Generator().manual_seed(1), rows[-1][2] + 1

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make).to(HERE, dtype)

    kernel = LowRankKernel(HERE, num_slots=2, long_runs=LongRuns.GROUPED)  # which knows no ids
    assert isinstance(kernel, LooksUp)
    beside, layer = kernel.layer(NUM_IDS, NUM_OUT, dtype, "model"), kernel.lookup(NUM_IDS, NUM_OUT, dtype)
    pairs = {slot: (drawn(rank, NUM_IDS), drawn(NUM_OUT, rank)) for slot, rank in RANKS.items()}
    for slot, (a_RV, b_OR) in pairs.items():
        layer.put(slot, a_RV, b_OR)
        beside.put(slot, -a_RV, b_OR)
    ids_T = torch.randint(NUM_IDS, (num_tokens,), generator=make).to(HERE)
    ids_T[0] = NUM_IDS - 1
    y_TO, scale_SO, shift_SO = drawn(num_tokens, NUM_OUT), drawn(16, NUM_OUT), drawn(16, NUM_OUT)
    own_TO, with_vectors_TO = y_TO.double(), y_TO.double()
    for slot, first, last in rows:
        term = torch.zeros(last - first, NUM_OUT, dtype=torch.float64, device=HERE)
        if slot in pairs:
            a_RV, b_OR = (each.double() for each in pairs[slot])
            term = a_RV[:, ids_T[first:last]].t() @ b_OR.t()
        own_TO[first:last] += term
        with_vectors_TO[first:last] = with_vectors_TO[first:last] * scale_SO[slot].double() + term
        with_vectors_TO[first:last] += shift_SO[slot].double()
    segments, found_TO, found_with_TO = Segments(rows, num_tokens), y_TO.clone(), y_TO.clone()
    layer.op(segments)(found_TO, ids_T)
    layer.op(segments, scale_SO, shift_SO)(found_with_TO, ids_T)
    room = ROOM[dtype] * float(with_vectors_TO.abs().max())
    torch.testing.assert_close(found_TO.double(), own_TO, rtol=0, atol=room)
    torch.testing.assert_close(found_with_TO.double(), with_vectors_TO, rtol=0, atol=room)
    assert torch.equal(found_TO[-1], y_TO[-1]), "a token without an adapter"


def test_factors_on_their_way_are_waited_for_and_other_lengths_are_refused() -> None:
    order: list[str] = []
    layer = LowRankKernel(HERE, num_slots=2).lookup(NUM_IDS, NUM_OUT, torch.float32)
    a_RV, b_OR = torch.ones(2, NUM_IDS, device=HERE), torch.ones(NUM_OUT, 2, device=HERE).t().contiguous().t()
    layer.put_early(1, a_RV, b_OR, lambda: order.append("waited"))
    op, y_TO = layer.op(Segments([(1, 0, 1)], 3)), torch.zeros(3, NUM_OUT, device=HERE)
    assert not order
    op(y_TO, torch.zeros(3, dtype=torch.int64, device=HERE))
    assert order == ["waited"]
    assert y_TO.sum(1).tolist() == [2 * NUM_OUT, 0, 0]
    with pytest.raises(ValueError, match="factors for 3 tokens got x"):
        op(y_TO, torch.zeros(4, dtype=torch.int64, device=HERE))
