"""Adapted routers: each adapter's tokens choose their experts as if the weight had been changed for it."""

from __future__ import annotations

import random
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.primitives import Adapter, Affine, LowRank
from peft_serve.core import BASE, AdapterId
from peft_serve.model.base import ResidentBase
from peft_serve.model.router_site import router_spec
from peft_serve.model.routing import Stream
from peft_serve.model.sites import AdaptedSites
from tests.adapters.checkpoints import randomise, save
from tests.model.driver import Driver, random_jobs
from tests.model.test_generation import expected
from tests.model.tiny_models import VOCAB
from tests.model.tiny_more import tiny_more

ROUTERS = {
    "mixtral": "gate",
    "qwen2_moe": "gate",
    "qwen3_moe": "gate",
    "olmoe": "gate",
    "gpt_oss": "router",
    "granitemoe": "router",
}


@pytest.mark.filterwarnings("ignore")  # what peft and the library say about each other
@pytest.mark.parametrize("name", ROUTERS)
def test_rows_with_adapted_routers_get_what_peft_gives_alone(name: str) -> None:
    base = ResidentBase(tiny_more(name), name=name)
    weight = f"{ROUTERS[name]}.weight"
    fields = {"target_modules": ["q_proj"], "lora_alpha": 24}
    oracles: dict[AdapterId, Any] = {BASE: tiny_more(name)}
    adapters: dict[AdapterId, Adapter] = {}
    for seed, more in enumerate(({"target_parameters": [weight]}, {"target_parameters": [weight], "r": 3}, {})):
        oracle: Any = peft.get_peft_model(tiny_more(name), peft.LoraConfig(**fields, **more))
        randomise(oracle, seed)
        adapter = compile_adapter(inspect(save(oracle), base, GateLimits()), base, GateLimits())
        assert any(path.endswith(ROUTERS[name]) for path in adapter.sites) == bool(more)
        adapters[adapter.id] = adapter
        oracles[adapter.id] = oracle.eval()
    driver = Driver(base, adapters, seed=1)
    driver.install(*adapters)
    ids = [BASE, *adapters]
    jobs = random_jobs(random.Random(2), count=8, vocab=VOCAB, adapter=lambda i: ids[i % len(ids)])
    driver.finish(jobs)
    for job in jobs:
        output, logprobs = expected(oracles[job.adapter], job)
        assert job.output == output, job.adapter
        assert job.logprobs == pytest.approx(logprobs, abs=2e-4)


class TopKRouter(nn.Module):
    """As transformers writes them; `flat` ones take all tokens for one line, `single` ones give the weights alone."""

    def __init__(self, *, is_flat: bool = True, is_single: bool = False) -> None:
        super().__init__()
        self.num_experts, self.is_flat, self.is_single = 5, is_flat, is_single
        self.weight = nn.Parameter(torch.randn(5, 8, generator=torch.Generator().manual_seed(3)), requires_grad=False)

    def forward(self, x: Tensor) -> Any:
        x = x.reshape(-1, 8) if self.is_flat else x
        top, index = nn.functional.linear(x, self.weight).softmax(-1).topk(2, dim=-1)
        return top if self.is_single else (top, index)


class Layer(nn.Module):
    def __init__(self, **form: bool) -> None:
        super().__init__()
        self.gate = TopKRouter(**form)


def delta(seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(2, 8, generator=generator), torch.randn(5, 2, generator=generator))


def worn(edit: Affine) -> Adapter:
    return Adapter(id=AdapterId("sha256:0"), method="TEST", sites={"gate": edit})


@pytest.mark.parametrize("is_flat", [True, False])
@pytest.mark.parametrize("is_single", [True, False])
@pytest.mark.parametrize("shape", [(9, 8), (1, 9, 8)])
def test_each_slot_has_a_router_of_its_own(is_flat: bool, is_single: bool, shape: tuple[int, ...]) -> None:
    layer, plain = Layer(is_flat=is_flat, is_single=is_single), Layer(is_flat=is_flat, is_single=is_single)
    sites = AdaptedSites(layer, stream_of=lambda _: Stream.TARGET)
    deltas = {1: delta(1), 2: delta(2)}
    for slot, one in deltas.items():
        sites.install(slot, worn(Affine(delta=one)))
    division = [(1, 2), (0, 3), (2, 1), (1, 2), (0, 1)]
    sites.route(Stream.TARGET, division)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        got = layer.gate(x)
        by_name = layer.gate(x=x)
    assert isinstance(got, Tensor) == is_single
    at = 0
    for slot, count in division:
        one = plain.gate
        weight = one.weight.data
        if slot:
            one.weight.data = weight + deltas[slot].b_OR @ deltas[slot].a_RI
        want = one(x[..., at : at + count, :])
        one.weight.data = weight
        for mine, named, theirs in zip(*((v,) if is_single else v for v in (got, by_name, want)), strict=True):
            torch.testing.assert_close(mine[..., at : at + count, :], theirs)
            assert torch.equal(mine, named)
            assert mine.ndim == theirs.ndim
        at += count
    assert torch.equal(plain.gate.weight, layer.gate.weight), "the base's own weight is never touched"


def test_a_batch_without_such_terms_is_the_modules_own() -> None:
    layer, plain = Layer(), Layer()
    sites = AdaptedSites(layer, stream_of=lambda _: Stream.TARGET)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(7))
    want = plain.gate(x)
    with torch.inference_mode():
        sites.install(1, worn(Affine(delta=delta(1))))
        assert torch.equal(layer.gate(x)[0], want[0]), "no route"
        sites.route(Stream.TARGET, [(0, 4)])
        assert torch.equal(layer.gate(x)[0], want[0])
        sites.route(Stream.TARGET, [(0, 1), (1, 3)])
        assert not torch.allclose(layer.gate(x)[0][1:], want[0][1:])
        with pytest.raises(ValueError, match="got 3 tokens"):
            layer.gate(x[:3])
        sites.remove(1)
        sites.install(1, Adapter(id=AdapterId("sha256:1"), method="TEST"))
        sites.route(Stream.TARGET, [(0, 1), (1, 3)])
        assert torch.equal(layer.gate(x)[0], want[0])


def test_a_router_takes_a_low_rank_term_alone() -> None:
    sites = AdaptedSites(Layer(), stream_of=lambda _: Stream.TARGET)
    for edit, reason in (
        (Affine(delta=delta(1), shift=torch.ones(5)), "delta alone and not delta, shift"),
        (Affine(out_scale=torch.ones(5)), "delta alone and not out_scale"),
        (Affine(delta=LowRank(torch.ones(2, 7), torch.ones(5, 2))), "delta.a has shape"),
    ):
        with pytest.raises(ValueError, match=reason):
            sites.install(1, worn(edit))


def test_what_is_no_such_router_is_no_site() -> None:
    class PairRouter(TopKRouter):
        def forward(self, x: Tensor, ids: Tensor) -> Any:
            return super().forward(x), ids

    class LinearRouter(nn.Linear):
        num_experts = 5

    class Weights(TopKRouter):
        pass

    odd = TopKRouter()
    odd.num_experts = 4
    nested = TopKRouter()
    nested.norm = nn.LayerNorm(8)
    for module in (PairRouter(), LinearRouter(8, 5), Weights(), odd, nested):
        assert router_spec("gate", module) is None
    spec = router_spec("gate", TopKRouter())
    assert spec is not None
    assert (spec.out_features, spec.in_features) == (5, 8)
