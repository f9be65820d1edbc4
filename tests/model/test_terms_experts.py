"""Low-rank terms on fused experts: each adapter's tokens as if the whole stack had been changed for it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig, OlmoeConfig, Qwen2MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.primitives import Adapter, Affine, ExpertFactors, Experts
from peft_serve.core import AdapterId
from peft_serve.model.routing import Stream
from peft_serve.model.sites import AdaptedSites
from tests.model.dense_algebra import Dice

HIDDEN, INNER, EXPERTS, TOP = 8, 12, 5, 2

MAKE: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: MixtralExperts(
        MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    ),
    "qwen2_moe": lambda: Qwen2MoeExperts(
        Qwen2MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS)
    ),
    "olmoe": lambda: OlmoeExperts(OlmoeConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_experts=EXPERTS)),
    "gpt_oss": lambda: GptOssExperts(
        GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    ),
}


class Layer(nn.Module):
    """A model whose one module is a stack of experts."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.experts = MAKE[name]()
        self.experts.config._experts_implementation = "eager"
        dice = Dice(5)
        with torch.no_grad():
            for parameter in self.experts.parameters():
                parameter.copy_(dice.normal(*parameter.shape))
        self.requires_grad_(False)


def adapter(spec: SiteSpec, seed: int, names: tuple[str, ...] = ("gate_up_proj", "down_proj")) -> Adapter:
    dice, factors = Dice(seed), {}
    for name in names:
        num_experts, num_out, num_in = spec.parameters[name]
        if spec.is_transposed:
            num_out, num_in = num_in, num_out
        rank = 1 + seed
        factors[name] = ExpertFactors(dice.normal(num_experts, rank, num_in), dice.normal(num_experts, num_out, rank))
    return Adapter(id=AdapterId(f"sha256:{seed}"), method="TEST", sites={spec.path: Experts(factors)})


def changed(layer: Layer, spec: SiteSpec, worn: Adapter) -> nn.Module:
    """A copy with the terms added into the whole stacks."""
    own = copy.deepcopy(layer.experts)
    edit = worn.sites[spec.path]
    assert isinstance(edit, Experts)
    for name, factors in edit.factors.items():
        delta = torch.einsum("eor,eri->eoi", factors.b_EOR, factors.a_ERI)
        getattr(own, name).add_(delta.transpose(1, 2) if spec.is_transposed else delta)
    return own


def routed(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    dice = Dice(3)
    x = dice.normal(num_tokens, HIDDEN, scale=1.0)
    index = torch.stack([dice.some(EXPERTS, TOP) for _ in range(num_tokens)])
    return x, index, dice.normal(num_tokens, TOP).abs()


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(
    "division",
    [
        [(0, 3), (1, 4), (2, 1), (3, 2), (4, 2)],
        [(0, 1), (1, 2), (0, 2), (1, 1), (2, 5), (0, 1)],
        [(1, 1), (2, 1), (3, 1)],
    ],
)
def test_experts_are_each_adapters_own(name: str, division: list[tuple[int, int]]) -> None:
    layer, plain = Layer(name), Layer(name)
    sites = AdaptedSites(layer, stream_of=lambda _: Stream.TARGET)
    spec = sites.specs["experts"]
    assert spec.kind is SiteKind.EXPERTS
    assert (spec.in_features, spec.out_features) == (HIDDEN, HIDDEN)
    assert spec.is_transposed == (name == "gpt_oss")
    worn = {1: adapter(spec, 1), 2: adapter(spec, 2, ("down_proj",)), 3: adapter(spec, 3, ("gate_up_proj",))}
    worn[4] = Adapter(id=AdapterId("sha256:4"), method="TEST")
    for slot, one in worn.items():
        sites.install(slot, one)
    x, index, weights = routed(sum(count for _, count in division))
    sites.route(Stream.TARGET, division)
    with torch.inference_mode():
        got = layer.experts(x, index, weights)
    at = 0
    for slot, count in division:
        here = slice(at, at + count)
        own = changed(plain, spec, worn[slot]) if slot in (1, 2, 3) else plain.experts
        with torch.inference_mode():
            want = own(x[here], index[here], weights[here])
        torch.testing.assert_close(got[here], want, rtol=1e-5, atol=1e-5, msg=lambda m, s=slot: f"slot {s}: {m}")
        at += count


def test_a_batch_without_such_terms_is_the_modules_own() -> None:
    layer, plain = Layer("mixtral"), Layer("mixtral")
    sites = AdaptedSites(layer, stream_of=lambda _: Stream.TARGET)
    spec = sites.specs["experts"]
    x, index, weights = routed(6)
    with torch.inference_mode():
        want = plain.experts(x, index, weights)
        sites.install(1, adapter(spec, 1))
        sites.route(Stream.TARGET, [(0, 6)])
        assert torch.equal(layer.experts(x, index, weights), want)
        sites.route(Stream.TARGET, [(0, 2), (1, 4)])
        own = layer.experts(x, index, weights)
        sites.route(Stream.TARGET, [(1, 4), (0, 2)])
        by_name = layer.experts(x.flip(0), top_k_index=index.flip(0), top_k_weights=weights.flip(0)).flip(0)
    torch.testing.assert_close(own, by_name)
    torch.testing.assert_close(own[:2], want[:2])
    assert not torch.allclose(own[2:], want[2:])
    sites.remove(1)
    sites.install(1, Adapter(id=AdapterId("sha256:0"), method="TEST"))
    sites.route(Stream.TARGET, [(0, 2), (1, 4)])
    with torch.inference_mode():
        assert torch.equal(layer.experts(x, index, weights), want)


def test_the_implementation_the_base_uses_does_not_matter() -> None:
    layer, plain = Layer("mixtral"), Layer("mixtral")
    layer.experts.config._experts_implementation = "grouped_mm"
    sites = AdaptedSites(layer, stream_of=lambda _: Stream.TARGET)
    spec = sites.specs["experts"]
    worn = adapter(spec, 2)
    sites.install(1, worn)
    sites.route(Stream.TARGET, [(0, 2), (1, 4)])
    x, index, weights = routed(6)
    with torch.inference_mode():
        got = layer.experts(x, index, weights)
        torch.testing.assert_close(got[:2], plain.experts(x[:2], index[:2], weights[:2]))
        torch.testing.assert_close(got[2:], changed(plain, spec, worn)(x[2:], index[2:], weights[2:]))


@pytest.mark.parametrize("name", ["gate_up_proj_bias", "no_proj"])
def test_only_stacks_of_matrices_take_such_terms(name: str) -> None:
    sites = AdaptedSites(Layer("gpt_oss"), stream_of=lambda _: Stream.TARGET)
    edit = Experts({name: ExpertFactors(torch.ones(5, 1, 8), torch.ones(5, 8, 1))})
    with pytest.raises(ValueError, match=f"no stack of expert matrices '{name}'"):
        sites.install(1, Adapter(id=AdapterId("sha256:0"), method="TEST", sites={"experts": edit}))


@pytest.mark.parametrize(
    "shapes", [((5, 1, 7), (5, 24, 1)), ((5, 2, 8), (5, 24, 1)), ((4, 1, 8), (4, 24, 1)), ((8,), (24,))]
)
def test_factors_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    sites = AdaptedSites(Layer("mixtral"), stream_of=lambda _: Stream.TARGET)
    edit = Experts({"gate_up_proj": ExpertFactors(torch.ones(shapes[0]), torch.ones(shapes[1]))})
    with pytest.raises(ValueError, match=r"gate_up_proj\.[ab] has shape"):
        sites.install(1, Adapter(id=AdapterId("sha256:0"), method="TEST", sites={"experts": edit}))
    with pytest.raises(ValueError, match="is a stack of experts"):
        sites.install(1, Adapter(id=AdapterId("sha256:0"), method="TEST", sites={"experts": Affine()}))
