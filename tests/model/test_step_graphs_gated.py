"""Gated prompts in captured decode steps: of any length, in any mix, and whoever comes into a slot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from peft_serve.adapters.primitives import Adapter, GatedPrompt
from peft_serve.core import BASE, AdapterId
from peft_serve.engine.gpu_terms import other_kernels
from peft_serve.kernels.triton.memory import DeviceMemory
from peft_serve.model.routing import Route
from peft_serve.model.terms.gated import GatedPrompts
from tests.model.test_step_graphs import CPU, IS_INTERPRETED, LORA, Bench, adapter, llama
from tests.model.tiny_models import tiny

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="the tiny models are on a CPU")


def prompted(bench: Bench, name: str, num_keys: int, *, path: str, is_projected: bool, num_own: int = 2) -> Adapter:
    make, shape = torch.Generator().manual_seed(sum(map(ord, name))), bench.base.shape

    def drawn() -> torch.Tensor:
        return torch.randn(num_own, num_keys, shape.head_dim, generator=make)

    gated = GatedPrompt(drawn(), drawn(), torch.tensor([0.7]), is_projected)
    return Adapter(id=AdapterId(name), method="ADAPTION_PROMPT", sites={path: gated})


@pytest.mark.parametrize(
    ("make", "path", "is_projected"),
    [
        pytest.param(llama, "model.layers.0.self_attn", True, id="llama"),
        pytest.param(lambda: tiny("gpt2"), "transformer.h.1.attn", False, id="gpt2"),
    ],
)
def test_prompts_of_any_length_are_served_by_what_was_captured_for_others(
    make: Callable[[], PreTrainedModel], path: str, is_projected: bool
) -> None:
    bench = Bench(make)
    first, long = (prompted(bench, name, n, path=path, is_projected=is_projected) for name, n in (("a", 3), ("b", 20)))
    bench.install(first, long)
    bench.answers(first.id, BASE, long.id)
    assert bench.num_recorded == 1
    third = prompted(bench, "d", 7, path=path, is_projected=is_projected, num_own=1)
    bench.put(1, third, instead_of=first)
    bench.answers(third.id, long.id, BASE)
    assert bench.num_recorded == 1
    assert bench.outcomes["eager"] == 0


def test_a_prompt_beside_a_low_rank_term() -> None:
    bench = Bench(llama)
    first = prompted(bench, "a", 3, path="model.layers.0.self_attn", is_projected=True)
    low_rank = adapter(bench.base, "c", LORA)
    bench.install(first, low_rank)
    bench.answers(low_rank.id, BASE, first.id)
    bench.answers(low_rank.id, BASE, BASE)
    bench.answers(first.id, BASE, BASE)
    assert bench.num_recorded == 1
    assert bench.outcomes["eager"] == 0


def test_a_prompt_that_has_left_asks_for_nothing() -> None:
    memory = DeviceMemory(CPU)
    prompts = GatedPrompts("path", torch.empty(0), head_dim=8, num_heads=4)
    prompts.use_others(other_kernels(memory))
    prompts.put(1, GatedPrompt(torch.ones(2, 3, 8), torch.ones(2, 3, 8), torch.ones(1), is_projected=True))
    route = Route(((1, 2),), {1}, {}, CPU)
    assert len(prompts.op(route)) == 1
    prompts.drop(1)
    assert prompts.op(route) == ()
    assert memory.slabs.num_used == 0
