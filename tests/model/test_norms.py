"""Norms in one call give the bits of the model's own, and only norms of that formula are replaced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from peft_serve.model.norms import norm_forward

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
