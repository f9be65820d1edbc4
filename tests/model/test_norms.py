"""Norms in one call give the bits of the model's own, and only norms of that formula are replaced."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.primitives import Replace
from peft_serve.kernels.native import NativeCode, cache_folder, find_compiler
from peft_serve.kernels.row_ops import RowOps
from peft_serve.model.norms import norm_forward
from peft_serve.model.routing import Lane
from peft_serve.model.sites_forward import NormSite

SIZE = 48


class OddRMSNorm(LlamaRMSNorm):
    """A norm of the usual name that rounds its input first."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.to(torch.bfloat16).float())


def gained(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(SIZE))
    return module


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("shape", [(1, 1, SIZE), (1, 7, SIZE), (1, 7, 3, SIZE)])
def test_a_norm_in_one_call_gives_the_same_bits(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = gained(kind(SIZE, eps=1e-5))
    fused = norm_forward(norm)
    assert fused != norm.forward
    x = 3 * torch.randn(shape)
    assert torch.equal(fused(x), norm(x))
    assert torch.equal(fused(hidden_states=x), norm(x))


@pytest.mark.parametrize("norm", [GemmaRMSNorm(SIZE), OddRMSNorm(SIZE), T5LayerNorm(SIZE), nn.LayerNorm(SIZE)])
def test_another_formula_stays_what_it_is(norm: nn.Module) -> None:
    torch.manual_seed(0)
    gained(norm) if not isinstance(norm, nn.LayerNorm) else None
    assert norm_forward(norm) == norm.forward


def test_a_norm_that_rounds_between_its_operations_keeps_its_bits() -> None:
    torch.manual_seed(0)
    norm = gained(LlamaRMSNorm(SIZE)).bfloat16()
    x = torch.randn(1, 9, SIZE).bfloat16()
    assert torch.equal(norm_forward(norm)(x), norm(x))


@pytest.mark.skipif(find_compiler(os.environ) is None, reason="this machine has no C++ compiler")
@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize("shape", [(1, 5, SIZE), (1, 5, 3, SIZE), (1, 3, 5, SIZE)])
@torch.inference_mode()
def test_norms_of_adapters_run_by_the_kernel_and_leave_others_their_bits(
    kind: type[nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    norm, own = gained(kind(SIZE, eps=1e-5)), gained(kind(SIZE, eps=1e-5))
    size = (SIZE,)
    spec = SiteSpec(path="norm", kind=SiteKind.NORM, out_features=SIZE, in_features=SIZE, parameters={"weight": size})
    lane = Lane()
    site = NormSite(spec, norm, lane)
    site.run_by(RowOps(NativeCode(find_compiler(os.environ), cache_folder(os.environ))))
    assert site.by_kernel is not None
    x = torch.randn(shape)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if shape[1] == 3 else x  # heads in front, memory by tokens
    plain = site.forward(x)
    for term in site.terms:
        term.put(2, Replace({"weight": own.weight.detach()}))
    lane.enter(((0, 1), (2, 2), (1, 2)), {1, 2}, {}, torch.device("cpu"), num_slots=3)
    given = site.forward(x)
    axis, others, its = 2 if shape[1] == 3 else 1, torch.tensor([0, 3, 4]), torch.tensor([1, 2])
    assert torch.equal(given.index_select(axis, others), plain.index_select(axis, others))
    expected = own(x).index_select(axis, its)
    torch.testing.assert_close(given.index_select(axis, its), expected, rtol=2e-6, atol=2e-6)
    assert not torch.allclose(plain.index_select(axis, its), expected)
