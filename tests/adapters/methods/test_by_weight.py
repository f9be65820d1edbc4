"""Where methods that change the weight rest on computations of their own: the same numbers as peft's and torch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lokr.layer import factorization
from peft.tuners.psoft.layer import OrthLayer
from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
from peft.tuners.waveft.waverec2d import waverec2d

from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.methods.blocks import _factors
from peft_serve.adapters.methods.by_svd import _is_found, _neumann
from peft_serve.adapters.methods.joint import role
from peft_serve.adapters.methods.sketch import svd_lowrank
from peft_serve.adapters.methods.wavelets import LOW_PASS, synthesis
from peft_serve.adapters.primitives import Affine, Dense, Sparse
from peft_serve.adapters.transform_primitives import Spectrum
from tests.adapters.checkpoints import make_base, make_checkpoint, methods_for, oracle_logits
from tests.adapters.fake_base import FakeBase, adapted_logits
from tests.adapters.making import by_weight


@pytest.mark.parametrize("family", LOW_PASS)
def test_synthesis_is_that_of_peft(family: str) -> None:
    assert WAVELET_REDUCTIONS[family] == (len(LOW_PASS[family]) - 2,) * 2
    bands = torch.randn(50, 42, generator=torch.Generator().manual_seed(1))
    h, w = 25, 21
    expected = waverec2d((bands[:h, :w], (bands[:h, w:], bands[h:, :w], bands[h:, w:])), family)
    got = synthesis(bands, family)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("shape", [(20, 31), (31, 20), (20, 20)])
def test_sketch_is_that_of_torch_and_leaves_the_process_its_random_numbers(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        u, s, v = torch.svd_lowrank(matrix, q=6, niter=3)
    before = torch.random.get_rng_state()
    got = svd_lowrank(matrix, 6, niter=3, seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)
    for mine, other in zip(got, (u, s, v.mT), strict=True):
        assert torch.allclose(mine, other, atol=1e-5)


@pytest.mark.parametrize("method", ["adamss", "randlora_unsaved", "fourierft", "waveft", "psoft", "frod"])
def test_compiling_leaves_the_process_its_random_numbers(method: str) -> None:
    base, limits = FakeBase(make_base("llama")), GateLimits()
    inspected = inspect(make_checkpoint(method, "llama")[0], base, limits)
    before, before_numpy = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    compile_adapter(inspected, base, limits)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], before_numpy)


@pytest.mark.parametrize("method", [m for m in methods_for("llama") if m in by_weight.METHODS])
def test_base_of_another_type(method: str) -> None:
    """On a bfloat16 base a method computes in float32 and is rounded once; indices stay as they are."""
    base = FakeBase(make_base("llama").bfloat16(), dtype=torch.bfloat16)
    files, _ = make_checkpoint(method, "llama", base=make_base("llama").bfloat16().float())
    adapter = compile_adapter(inspect(files, base, GateLimits()), base, GateLimits())
    for tensor in adapter.tensors():
        assert tensor.dtype == (torch.bfloat16 if tensor.is_floating_point() else torch.int64)
        assert tensor.is_contiguous() or tensor.t().is_contiguous()


@pytest.mark.parametrize("num_terms", range(1, 9))
def test_series_of_a_rotation(num_terms: int) -> None:
    layer = OrthLayer(5, mag_a=False, mag_b=False, use_cayley_neumann=True, num_cayley_neumann_terms=num_terms)
    with torch.no_grad():
        layer.weight.copy_(0.1 * torch.arange(10))
        assert torch.allclose(_neumann(layer._skew_symmetric(), num_terms), layer.get_matrix(), atol=1e-6)


@pytest.mark.parametrize("factor", [-1, 0, 1, 2, 4, 5, 7, 8, 100])
def test_factors_of_a_size(factor: int) -> None:
    for size in (*range(1, 130), 768, 1000, 1009, 4096, 11008):
        assert _factors(size, factor) == factorization(size, factor), size


@pytest.mark.parametrize(("num_places", "kept"), [(170, {Spectrum}), (171, {Spectrum, Dense}), (512, {Dense})])
def test_a_spectrum_is_kept_while_it_is_smaller_than_its_matrix(num_places: int, kept: set[type]) -> None:
    """v_proj has 512 entries, the others 1024 and more."""
    base = FakeBase(make_base("llama"))

    def change(config: Any) -> None:
        config.n_frequency = num_places

    files, oracle = make_checkpoint("fourierft", "llama", change=change)
    adapter = compile_adapter(inspect(files, base, GateLimits()), base, GateLimits())
    edits = [edit for edit in adapter.sites.values() if isinstance(edit, Affine)]
    assert {type(one) for edit in edits for one in edit.maps} == kept
    ids = torch.arange(3, 12)[None]
    expected = oracle_logits(oracle, ids, ids)
    assert (adapted_logits(base, adapter, ids, ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("family", "kept"), [("db1", {Sparse, Dense}), ("db4", {Dense})])
def test_few_short_wavelets_are_kept_by_their_entries(family: str, kept: set[type]) -> None:
    """Ten wavelets of two by two are 40 entries, which is little for 1024 and too much for v_proj's 512."""
    base = FakeBase(make_base("llama"))

    def change(config: Any) -> None:
        config.n_frequency, config.wavelet_family = 10, family

    files, oracle = make_checkpoint("waveft", "llama", change=change)
    adapter = compile_adapter(inspect(files, base, GateLimits()), base, GateLimits())
    edits = [edit for edit in adapter.sites.values() if isinstance(edit, Affine)]
    assert {type(one) for edit in edits for one in edit.maps} == kept
    ids = torch.arange(3, 12)[None]
    expected = oracle_logits(oracle, ids, ids)
    assert (adapted_logits(base, adapter, ids, ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_roles() -> None:
    assert role("model.layers.3.self_attn.q_proj") == "self_attn_q_proj"
    assert role("encoder.layer.1.attention.output.dense") == "attention_output"
    assert role("encoder.layer.1.output.dense") == "output_dense"
    assert role("blocks.2.mixer") == "mixer"
    assert role("lm_head") == "lm_head"


def test_patterns_that_are_searched_for() -> None:
    path = "model.layers.1.self_attn.q_proj"
    assert all(_is_found(p, path) for p in ("q_proj", "layers.1", "^model", "q_proj$", f"^{path}$", "self_attn.q"))
    assert not any(_is_found(p, path) for p in ("^layers", "self_attn$", "v_proj", "^model$"))
