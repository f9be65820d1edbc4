"""Norms and rotations in one call: the formulas, alone and in any batch to the bit."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from peft_serve.kernels.native import NativeCode, cache_folder, find_compiler
from peft_serve.kernels.row_ops import RowOps

pytestmark = pytest.mark.skipif(find_compiler(os.environ) is None, reason="this machine has no C++ compiler")


@pytest.fixture(scope="module")
def ops() -> RowOps:
    return RowOps(NativeCode(find_compiler(os.environ), cache_folder(os.environ)))


def _random(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


@pytest.mark.parametrize("size", [1, 7, 32, 48, 133, 896, 40000])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_a_norm_is_its_formula_and_every_row_is_its_own(ops: RowOps, size: int, scale: float) -> None:
    x_TI, gain_I = _random(9, size) * scale + scale, _random(size)
    norm = ops.rms_norm(gain_I, 1e-6)
    y_TI = norm(x_TI)
    x = x_TI.double()
    exact_TI = gain_I.double() * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert ((y_TI - exact_TI).abs() <= 1e-6 * exact_TI.abs() + 1e-30).all()
    for row in range(len(x_TI)):
        assert torch.equal(norm(x_TI[row : row + 1])[0], y_TI[row])


@pytest.mark.parametrize(("each", "size"), [(1, 133), (3, 32), (1, 40000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_of_its_own_has_the_bits_of_one_for_all(ops: RowOps, each: int, size: int, dtype: torch.dtype) -> None:
    gains_SI, slot_T = _random(4, size).to(dtype), torch.tensor([3, 0, 0, 2, 3])
    x = _random(1, 5, each, size).to(dtype)
    y = ops.own_rms_norm(gains_SI, slot_T, 1e-6)(x)
    for token, slot in enumerate(slot_T.tolist()):
        assert torch.equal(y[:, token], ops.rms_norm(gains_SI[slot], 1e-6)(x[:, token]))


def test_a_norm_takes_what_has_gaps_and_leaves_it_as_it_was(ops: RowOps) -> None:
    x = _random(1, 5, 2, 64)
    given = x[:, :, 1]
    before = given.clone()
    assert torch.equal(ops.rms_norm(torch.ones(64), 1e-5)(given), ops.rms_norm(torch.ones(64), 1e-5)(before))
    assert torch.equal(given, before)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head"), [(4, 4, 16), (6, 2, 64), (3, 1, 12), (8, 1, 2)])
@pytest.mark.parametrize("num_tokens", [1, 5, 200])
def test_queries_and_keys_are_turned_and_keys_and_values_stored(
    ops: RowOps, num_heads: int, num_kv_heads: int, head: int, num_tokens: int
) -> None:
    q, k = _random(num_tokens, num_heads, head), _random(num_tokens, num_kv_heads, head)
    v = k + 1
    cosines, sines = _random(num_tokens, head), _random(num_tokens, head) + 1  # halves of a head differ
    places = torch.randperm(num_tokens + 9, generator=torch.Generator().manual_seed(0))[:num_tokens]
    keys, values = torch.zeros(2, num_tokens + 9, num_kv_heads, head).unbind(0)
    turned_q, turned_k = apply_rotary_pos_emb(q[None], k[None], cosines[None], sines[None], unsqueeze_dim=2)
    own_q, own_k = q.clone(), k.clone()
    ops.rotate_and_store(own_q, own_k, v, (cosines, sines), places, (keys, values))
    assert (own_q - turned_q[0]).abs().max() <= 1e-6 * turned_q.abs().max()
    assert (own_k - turned_k[0]).abs().max() <= 1e-6 * turned_k.abs().max()
    assert torch.equal(keys[places], own_k)
    assert torch.equal(values[places], v)
    is_free = torch.ones(len(keys), dtype=torch.bool)
    is_free[places] = False
    assert not keys[is_free].any()
    assert not values[is_free].any()
    last = slice(num_tokens - 1, num_tokens)
    alone_q, alone_k = q[last].clone(), k[last].clone()
    ops.rotate_and_store(alone_q, alone_k, v[last], (cosines[last], sines[last]), places[last], (keys, values))
    assert torch.equal(alone_q, own_q[last])
    assert torch.equal(alone_k, own_k[last])


@pytest.mark.parametrize("num", [1, 8, 13, 4096, 40003])
def test_a_gate_is_its_formula_and_every_number_is_its_own(ops: RowOps, num: int) -> None:
    x, up = 12 * _random(num), _random(num + 1)[:num]
    exact = x.double() * torch.sigmoid(x.double()) * up.double()
    opened = ops.gate_(x.clone(), up)
    assert ((opened - exact).abs() <= 1e-6 * exact.abs() + 1e-30).all()
    for at in (0, num // 2, num - 1):
        assert torch.equal(ops.gate_(x[at : at + 1].clone(), up[at : at + 1].clone()), opened[at : at + 1])


def test_a_gate_of_extreme_numbers(ops: RowOps) -> None:
    x = torch.tensor([-200.0, -90.0, -0.0, 0.0, 90.0, 3e38, float("nan")])
    opened = ops.gate_(x.clone(), torch.ones(7))
    assert opened[:-1].tolist() == pytest.approx([0, 0, 0, 0, 90, 3e38], rel=1e-6, abs=1e-30)
    assert opened[-1].isnan()


def test_bfloat16_is_rounded_where_the_models_round(ops: RowOps) -> None:
    x, gain, up = (_random(9, 64).bfloat16() for _ in range(3))
    norm = ops.rms_norm(gain[0], 1e-6)(x)
    wide = x.float()
    own = gain[0] * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert (norm != own).float().mean() < 0.01
    assert (norm - own).abs().max() <= 2**-7 * own.abs().max()
    assert (ops.gate_(x.clone(), up) != torch.nn.functional.silu(x) * up).float().mean() < 0.01
    q, k = _random(9, 4, 16).bfloat16(), _random(9, 2, 16).bfloat16()
    cosines, sines = (_random(9, size)[:, :16].bfloat16() for size in (16, 17))
    turned_q, turned_k = apply_rotary_pos_emb(q[None], k[None], cosines[None], sines[None], unsqueeze_dim=2)
    keys, values = torch.zeros(2, 9, 2, 16, dtype=torch.bfloat16).unbind(0)
    ops.rotate_and_store(q, k, k.clone(), (cosines, sines), torch.arange(9), (keys, values))
    assert torch.equal(q, turned_q[0])
    assert torch.equal(keys, turned_k[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 13, 640])
def test_rows_of_a_table_by_slot(ops: RowOps, dtype: torch.dtype, size: int) -> None:
    x, table, slots = _random(7, size).to(dtype), _random(4, size).to(dtype), torch.tensor([0, 3, 3, 1, 0, 2, 1])
    functions, y = ops.functions[dtype], torch.empty_like(x)
    functions.scale(y.data_ptr(), x.data_ptr(), table.data_ptr(), slots.data_ptr(), 7, size)
    assert torch.equal(y, x * table[slots])
    functions.shift(y.data_ptr(), table.data_ptr(), slots.data_ptr(), 7, size)
    assert torch.equal(y, x * table[slots] + table[slots])
