"""Attention modules and gated layers in fewer calls: which are taken for what they are, and which are left alone."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, apply_rotary_pos_emb

from peft_serve.kernels.native import NativeCode, cache_folder, find_compiler
from peft_serve.kernels.row_ops import RowOps
from peft_serve.model.base import ResidentBase
from peft_serve.model.gated_mlp import gated_forward
from peft_serve.model.rotary_attention import RotaryAttention, rotary_attention
from tests.model.tiny_models import tiny

pytestmark = pytest.mark.skipif(find_compiler(os.environ) is None, reason="this machine has no C++ compiler")


@pytest.fixture(scope="module")
def ops() -> RowOps:
    return RowOps(NativeCode(find_compiler(os.environ), cache_folder(os.environ)))


def _shorter(base: ResidentBase, ops: RowOps) -> list[RotaryAttention | None]:
    return [rotary_attention(module, base.runs.attention, ops) for module in base.adapted.beside_attention]


@pytest.mark.parametrize("name", ["llama", "llama-mha", "qwen2", "qwen3", "mistral", "gemma"])
def test_attention_with_rotary_positions_is_known(name: str, ops: RowOps) -> None:
    base = ResidentBase(tiny(name), name=name)
    shorter = _shorter(base, ops)
    assert len(shorter) == 2
    assert None not in shorter


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "opt", "bart"])
def test_attention_that_does_more_stays_what_it_is(name: str, ops: RowOps) -> None:
    base = ResidentBase(tiny(name), name=name)
    assert set(_shorter(base, ops)) <= {None}


def test_bfloat16_is_known_and_another_dtype_stays_what_it_is(ops: RowOps) -> None:
    assert None not in _shorter(ResidentBase(tiny("llama").bfloat16(), name="llama"), ops)
    assert set(_shorter(ResidentBase(tiny("llama").half(), name="llama"), ops)) == {None}


def _turned_by_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return apply_rotary_pos_emb(q, k, cos * 1.001, sin)


def test_a_trial_tells_another_formula_of_the_same_names(ops: RowOps, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ResidentBase(tiny("llama"), name="llama")
    with monkeypatch.context() as patched:
        patched.setitem(LlamaAttention.forward.__globals__, "apply_rotary_pos_emb", _turned_by_halves)
        assert set(_shorter(base, ops)) == {None}
    assert None not in _shorter(base, ops)


class Scaled(LlamaAttention):
    """One that does more than its names tell a reader of names alone."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        return super().forward(hidden_states, **kwargs)


def test_a_forward_that_names_something_else_is_not_tried(ops: RowOps) -> None:
    base = ResidentBase(tiny("llama"), name="llama")
    module = next(iter(base.adapted.beside_attention))
    module.__class__ = Scaled
    assert rotary_attention(module, base.runs.attention, ops) is None


def test_the_window_and_the_scaling_are_the_modules_own(ops: RowOps) -> None:
    base = ResidentBase(tiny("mistral"), name="mistral")
    for attention in _shorter(base, ops):
        assert attention is not None
        assert (attention.terms.window, attention.terms.scaling) == (6, 8**-0.5)


def test_what_a_pass_does_not_usually_ask_is_left_to_the_module(ops: RowOps) -> None:
    """Without a pass under way nothing says where keys go: the module's own forward refuses that."""
    base = ResidentBase(tiny("llama"), name="llama")
    attention = _shorter(base, ops)[0]
    assert attention is not None
    angles = torch.ones(1, 1, 8), torch.zeros(1, 1, 8)
    with pytest.raises(KeyError):
        attention.forward(torch.ones(1, 1, 32), position_embeddings=angles, attention_mask=None)


class Odd(LlamaMLP):
    """The same names in another order."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
        return out


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "gemma2"])
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_gated_layers_give_the_modules_numbers(name: str, dtype: torch.dtype, share: float, ops: RowOps) -> None:
    model = tiny(name).to(dtype)
    known = [(m, gated) for m in model.modules() if (gated := gated_forward(m, ops)) is not None]
    assert len(known) == 2
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    for module, gated in known:
        before, own = x.clone(), module(x)
        assert (gated(x) - own).abs().max() <= share * own.abs().max()
        assert torch.equal(x, before)


def test_other_layers_stay_what_they_are(ops: RowOps) -> None:
    model = tiny("llama")
    module: nn.Module = next(m for m in model.modules() if isinstance(m, LlamaMLP))
    assert gated_forward(module, ops) is not None
    module.__class__ = Odd
    assert gated_forward(module, ops) is None
    assert not [m for m in tiny("gpt2").modules() if gated_forward(m, ops) is not None]
