"""Gated prompts in Triton, by its interpreter: of any length and number of heads in one step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_serve.kernels.low_rank import Segments
from tests.kernels.triton.interpreter import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")

from peft_serve.kernels.triton.gated import GatedKernel, LayerPrompts
from peft_serve.kernels.triton.memory import DeviceMemory
from peft_serve.kernels.triton.shrinking import DTYPES

HERE = torch.device(DEVICE)
NUM_HEADS, HEAD = 4, 24
Row = tuple[int, int, int]
ROWS: list[Row] = [(1, 0, 1), (2, 1, 19), (4, 19, 20), (3, 21, 24), (1, 24, 25)]  # slot 4 has nothing here
PROMPTS = {1: (4, 1), 2: (2, 40), 3: (1, 16), 9: (1, 3)}  # heads of its own, and learned tokens
ROOM = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
Prompt = tuple[Tensor, Tensor, Tensor]


def _drawn(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(HERE, dtype)


def _layer(dtype: torch.dtype) -> tuple[LayerPrompts, dict[int, Prompt]]:
    layer, prompts = GatedKernel(DeviceMemory(HERE, num_slots=2)).layer(NUM_HEADS, HEAD, dtype), {}
    for slot, (num_own, num_keys) in PROMPTS.items():
        keys, values = (_drawn(slot + by, dtype, num_own, num_keys, HEAD) for by in (0, 100))
        prompts[slot] = keys, values, torch.tensor([0.5 + slot], device=HERE).to(dtype)
        layer.put(slot, *prompts[slot])
    return layer, prompts


def _expected(o_TQD: Tensor, q_TQD: Tensor, prompts: dict[int, Prompt], rows: list[Row]) -> Tensor:
    expected_TQD = o_TQD.double()
    for slot, first, last in rows:
        if slot in prompts:
            keys, values = (each.double().repeat_interleave(NUM_HEADS // len(each), 0) for each in prompts[slot][:2])
            scores = torch.einsum("tqd,qmd->tqm", q_TQD[first:last].double(), keys) * HEAD**-0.5
            added = torch.einsum("tqm,qmd->tqd", scores.softmax(-1), values)
            expected_TQD[first:last] += prompts[slot][2].double() * added
    return expected_TQD


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_token_gets_what_its_adapters_prompt_gives(dtype: torch.dtype) -> None:
    layer, prompts = _layer(dtype)
    q_TQD, o_TQD = (_drawn(seed, dtype, 26, NUM_HEADS, HEAD) for seed in (200, 201))
    q_TQD[3] *= 30  # one token decides
    expected_TQD, before_TQD = _expected(o_TQD, q_TQD, prompts, ROWS), o_TQD.clone()
    op = layer.op(Segments(ROWS, 26))
    op(o_TQD, q_TQD)
    room = ROOM[dtype] * float(expected_TQD.abs().max())
    torch.testing.assert_close(o_TQD.double(), expected_TQD, rtol=0, atol=room)
    assert torch.equal(o_TQD[[19, 20, 25]], before_TQD[[19, 20, 25]])
    turned_TQD = before_TQD.transpose(0, 1).contiguous().transpose(0, 1)  # it lies otherwise
    op(turned_TQD, q_TQD)
    assert torch.equal(turned_TQD, o_TQD)


def test_a_token_has_the_same_bits_alone() -> None:
    layer, _ = _layer(torch.float32)
    q_TQD, o_TQD = (_drawn(seed, torch.float32, 19, NUM_HEADS, HEAD) for seed in (200, 201))
    alone_TQD = o_TQD[5:6].clone()
    layer.op(Segments([(2, 1, 19)], 19))(o_TQD, q_TQD)
    layer.op(Segments([(2, 0, 1)], 1))(alone_TQD, q_TQD[5:6])
    assert torch.equal(alone_TQD[0], o_TQD[5])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says what happens
def test_what_is_not_finite_stays_in_its_row() -> None:
    layer, _ = _layer(torch.float32)
    q_TQD, o_TQD = _drawn(1, torch.float32, 3, NUM_HEADS, HEAD), torch.zeros(3, NUM_HEADS, HEAD, device=HERE)
    q_TQD[1] = float("inf")
    layer.op(Segments([(3, 0, 3)], 3))(o_TQD, q_TQD)
    assert o_TQD[[0, 2]].isfinite().all()
    assert not o_TQD[1].isfinite().any()


def test_slots_change_hands_and_other_shapes_are_refused() -> None:
    layer, prompts = _layer(torch.float32)
    q_TQD, o_TQD = (_drawn(seed, torch.float32, 3, NUM_HEADS, HEAD) for seed in (7, 8))
    layer.drop(2)
    layer.drop(5)  # had nothing
    layer.put(1, *prompts[9])
    rows: list[Row] = [(1, 0, 1), (2, 1, 3)]
    expected_TQD = _expected(o_TQD, q_TQD, {1: prompts[9]}, rows)
    op = layer.op(Segments(rows, 3))
    op(o_TQD, q_TQD)
    torch.testing.assert_close(o_TQD.double(), expected_TQD, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"prompts for \[3, 4, 24\] got o"):
        op(o_TQD[1:], q_TQD[1:])
