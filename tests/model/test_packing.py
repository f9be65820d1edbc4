"""Packed weights give the model's own logits, and adapters act on top of them as before."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import nn

from peft_serve.adapters.base import SiteKind
from peft_serve.adapters.primitives import Adapter, Affine, LowRank
from peft_serve.core import AdapterId
from peft_serve.kernels.few_rows import FewRows
from peft_serve.kernels.native import NativeCode, cache_folder, find_compiler
from peft_serve.model.packing import Pack, can_pack, gains_from_kernels, is_worth_its_room, packed_linear
from peft_serve.model.routing import Stream
from peft_serve.model.sites import AdaptedSites
from tests.adapters.checkpoints import make_base

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="this torch has no oneDNN")


@pytest.mark.parametrize("num_rows", [1, 3, 16, 70])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_packed_layer_is_the_layer(num_rows: int, has_bias: bool) -> None:
    torch.manual_seed(num_rows)
    layer = nn.Linear(33, 47, bias=has_bias)
    x = torch.randn(1, num_rows, 33)
    with torch.inference_mode():
        y = packed_linear(layer.weight, layer.bias)(x)
        torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)
        y += 1  # a new tensor, which terms may change in place
    assert y.shape == (1, num_rows, 47)


def _ours() -> Pack:
    if find_compiler(os.environ) is None:
        pytest.skip("this machine has no C++ compiler")
    return FewRows(NativeCode(find_compiler(os.environ), cache_folder(os.environ))).linear


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("pack_of", [lambda: packed_linear, _ours], ids=["oneDNN", "ours"])
def test_a_packed_model_with_an_adapter_equals_a_plain_one(kind: str, pack_of: Callable[[], Pack]) -> None:
    ids = torch.tensor([[5, 9, 30, 2, 7]])
    logits = []
    for is_packed in (False, True):
        model = make_base(kind)
        sites = AdaptedSites(model, stream_of=lambda path: Stream.HEAD if path == "lm_head" else Stream.TARGET)
        if is_packed:
            sites.pack(pack_of(), fewest=1)
        torch.manual_seed(0)
        dense = {p: s for p, s in sites.specs.items() if s.kind in (SiteKind.LINEAR, SiteKind.CONV1D) and "lm" not in p}
        edits = {
            p: Affine(delta=LowRank(torch.randn(4, s.in_features), 0.1 * torch.randn(s.out_features, 4)))
            for p, s in dense.items()
        }
        sites.install(1, Adapter(id=AdapterId("sha256:1"), method="LORA", sites=edits))
        with torch.inference_mode():
            plain = model(input_ids=ids, use_cache=False).logits
            sites.route(Stream.TARGET, [(0, 2), (1, 3)])
            logits.append(torch.cat([plain, model(input_ids=ids, use_cache=False).logits]))
    scale = float(logits[0].abs().max())
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5 * scale)
    assert not torch.allclose(logits[0][0], logits[0][1], atol=1e-3 * scale)


@pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="this CPU computes in bfloat16")
@pytest.mark.parametrize("num_rows", [1, 2, 16])
def test_a_packed_bfloat16_layer_is_the_layer_but_for_its_last_rounding(num_rows: int) -> None:
    torch.manual_seed(num_rows)
    layer = nn.Linear(96, 64).bfloat16()
    x = torch.randn(1, num_rows, 96).bfloat16()
    with torch.inference_mode():
        y = packed_linear(layer.weight, layer.bias)(x)
        torch.testing.assert_close(y, layer(x), rtol=2**-7, atol=2**-7)
        exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        assert (y - exact).abs().max() <= (layer(x) - exact).abs().max() * 1.01
    assert y.dtype == torch.bfloat16


def test_a_small_matrix_is_not_packed() -> None:
    model = make_base("llama")
    sites = AdaptedSites(model, stream_of=lambda _: Stream.TARGET)
    ids = torch.tensor([[5, 9, 30]])
    with torch.inference_mode():
        before = model(input_ids=ids, use_cache=False).logits
        sites.pack()
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


def test_packing_is_for_a_cpu_with_room() -> None:
    assert not can_pack(CPU, torch.float16)
    assert not can_pack(torch.device("meta"), torch.float32)
    assert gains_from_kernels(CPU, torch.float32, has_tiles=False)
    assert not gains_from_kernels(CPU, torch.float16, has_tiles=True)
    assert not gains_from_kernels(torch.device("meta"), torch.bfloat16, has_tiles=True)
    assert gains_from_kernels(CPU, torch.bfloat16, has_tiles=False) == can_pack(CPU, torch.bfloat16)
    assert gains_from_kernels(CPU, torch.bfloat16, has_tiles=True)
    assert gains_from_kernels(CPU, torch.bfloat16, has_tiles=False, is_always=True)
    assert not gains_from_kernels(CPU, torch.float16, has_tiles=True, is_always=True)
    assert is_worth_its_room(1, torch.float32)
    assert not is_worth_its_room(1 << 60, torch.float32)
    assert not is_worth_its_room(1, torch.bfloat16)
