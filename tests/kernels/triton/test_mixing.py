"""Block-diagonal maps in Triton, by its interpreter: blocks of any size in one step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_serve.kernels.low_rank import Segments
from tests.kernels.triton.interpreter import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

from peft_serve.kernels.triton.memory import DeviceMemory
from peft_serve.kernels.triton.mixing import LayerBlocks, MixingKernel

HERE = torch.device(DEVICE)
NUM_FEATURES = 144
ROWS = [(1, 0, 1), (2, 1, 19), (4, 19, 20), (3, 21, 24), (1, 24, 25)]  # slot 4 has nothing here, token 20 no adapter


def _layer(dtype: torch.dtype) -> tuple[LayerBlocks, dict[int, Tensor]]:
    rng = torch.Generator().manual_seed(5)
    layer = MixingKernel(DeviceMemory(HERE, num_slots=2)).layer(NUM_FEATURES, dtype)
    blocks = {}
    for slot, size in ((1, 12), (2, 48), (3, 36), (9, 144)):
        blocks[slot] = torch.randn(NUM_FEATURES // size, size, size, generator=rng).to(HERE, dtype)
        layer.put(slot, blocks[slot])
    return layer, blocks


def _expected(x_TD: Tensor, y_TD: Tensor, blocks: dict[int, Tensor], rows: list[tuple[int, int, int]]) -> Tensor:
    expected_TD = y_TD.double()
    for slot, first, last in rows:
        if slot in blocks:
            matrix = torch.block_diag(*blocks[slot].double())
            expected_TD[first:last] = x_TD[first:last].double() @ matrix
    return expected_TD


@pytest.mark.parametrize(("dtype", "room"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)], ids=str)
def test_every_token_is_mixed_by_its_adapter(dtype: torch.dtype, room: float) -> None:
    layer, blocks = _layer(dtype)
    rng = torch.Generator().manual_seed(6)
    x_TD, y_TD = (torch.randn(26, NUM_FEATURES, generator=rng).to(HERE, dtype) for _ in range(2))
    expected_TD, before_TD = _expected(x_TD, y_TD, blocks, ROWS), y_TD.clone()
    layer.op(Segments(ROWS, 26))(y_TD, x_TD)
    torch.testing.assert_close(y_TD.double(), expected_TD, rtol=0, atol=room * float(expected_TD.abs().max()))
    assert torch.equal(y_TD[[19, 20, 25]], before_TD[[19, 20, 25]])


def test_slots_change_hands() -> None:
    layer, blocks = _layer(torch.float32)
    x_TD, y_TD = torch.randn(3, NUM_FEATURES, device=HERE), torch.zeros(3, NUM_FEATURES, device=HERE)
    layer.drop(2)
    layer.drop(5)  # had nothing
    layer.put(1, blocks[3])
    rows = [(1, 0, 1), (2, 1, 3)]
    layer.op(Segments(rows, 3))(y_TD, x_TD)
    expected_TD = _expected(x_TD, torch.zeros_like(y_TD), {1: blocks[3]}, rows)
    torch.testing.assert_close(y_TD.double(), expected_TD, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says what happens
def test_what_is_not_finite_stays_in_its_row() -> None:
    layer, _ = _layer(torch.float32)
    x_TD, y_TD = torch.randn(3, NUM_FEATURES, device=HERE), torch.zeros(3, NUM_FEATURES, device=HERE)
    x_TD[1] = float("inf")
    layer.op(Segments([(3, 0, 3)], 3))(y_TD, x_TD)
    assert y_TD[[0, 2]].isfinite().all()
    assert not y_TD[1].isfinite().any()


def test_another_number_of_tokens_is_refused() -> None:
    layer, _ = _layer(torch.float32)
    with pytest.raises(ValueError, match=r"blocks for \[3, 144\] got x"):
        layer.op(Segments([(1, 0, 3)], 3))(torch.zeros(2, NUM_FEATURES), torch.ones(2, NUM_FEATURES))
