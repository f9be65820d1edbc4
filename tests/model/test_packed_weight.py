"""A packed weight is the weight to whoever reads it, and nothing of the plain one is kept."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from types import FunctionType, ModuleType

import pytest
import torch
from torch import Tensor, nn

from peft_serve.adapters.base import SiteKind
from peft_serve.adapters.primitives import Adapter, Replace
from peft_serve.core import AdapterId
from peft_serve.kernels.few_rows import FewRows
from peft_serve.kernels.native import NativeCode, cache_folder, find_compiler
from peft_serve.model.base import ResidentBase
from peft_serve.model.packed_weight import PackedWeight, WeightPlaces, pieces
from peft_serve.model.quantised import dense, is_quantised
from tests.model.tiny_models import tiny

pytestmark = pytest.mark.skipif(find_compiler(os.environ) is None, reason="this machine has no C++ compiler")


@pytest.fixture(scope="module")
def few_rows() -> FewRows:
    return FewRows(NativeCode(find_compiler(os.environ), cache_folder(os.environ)))


def _packed(name: str, few_rows: FewRows, dtype: torch.dtype = torch.float32) -> ResidentBase:
    base = ResidentBase(tiny(name).to(dtype), name=name)
    base.adapted.pack(few_rows.linear, fewest=1, places=WeightPlaces(base.model))
    return base


def _matrices(base: ResidentBase) -> Iterator[str]:
    return (path for path, spec in base.sites.items() if spec.kind in (SiteKind.LINEAR, SiteKind.CONV1D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_whoever_reads_a_weight_is_given_its_bits(name: str, dtype: torch.dtype, few_rows: FewRows) -> None:
    plain, packed = ResidentBase(tiny(name).to(dtype), name=name), _packed(name, few_rows, dtype)
    paths = list(_matrices(packed))
    assert paths
    for path in paths:
        own, instead = (base.model.get_submodule(path).weight for base in (plain, packed))
        assert isinstance(instead, PackedWeight)
        assert isinstance(instead, nn.Parameter)
        assert (instead.shape, instead.dtype, instead.device) == (own.shape, own.dtype, own.device)
        assert not is_quantised(packed.model.get_submodule(path))
        assert torch.equal(instead.detach(), own)
        assert torch.equal(instead[1:, 0] * 3, own[1:, 0] * 3)
        assert torch.equal(dense(packed.model.get_submodule(path), "weight"), own.float())
        assert torch.equal(packed.weight(path), plain.weight(path))
        assert torch.equal(torch.cat(list(pieces(instead))), own)
    assert packed.fingerprint() == plain.fingerprint()
    assert packed.tied == plain.tied


def test_a_changed_weight_changes_the_fingerprint(few_rows: FewRows) -> None:
    """What is digested is what is served: the panels, and no copy of them."""
    base = _packed("llama", few_rows)
    before = base.fingerprint()
    product = base.adapted.at["model.layers.1.mlp.up_proj"].product  # type: ignore[attr-defined]
    (panels,) = [kept for kept in product.kept if isinstance(kept, Tensor) and kept.numel() >= product.num_out * 2]
    panels[7] += 1
    assert base.fingerprint() != before


def _tied(name: str, dtype: torch.dtype) -> ResidentBase:
    model = tiny(name).to(dtype)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return ResidentBase(model, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"])
def test_an_embedding_that_is_tied_to_a_packed_head_looks_its_rows_up_there(
    name: str, dtype: torch.dtype, few_rows: FewRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = _tied(name, dtype)
    embedding = base.model.get_input_embeddings()
    ids = torch.tensor([[5, 0, 96], [5, 7, 8]])
    with torch.inference_mode():
        expected = embedding(ids)
    base.adapted.pack(few_rows.linear, fewest=1, places=WeightPlaces(base.model))
    assert embedding.weight is base.model.get_output_embeddings().weight
    with torch.inference_mode():
        monkeypatch.setattr(PackedWeight, "plain", _refuse)
        assert torch.equal(embedding(ids), expected)
        with pytest.raises(IndexError):
            embedding(torch.tensor([97]))


def _refuse(_weight: PackedWeight) -> Tensor:
    raise AssertionError("the whole matrix was made for a few rows of it")


def _num_filled_up(few_rows: FewRows, weight: Tensor) -> int:
    """Panels have whole columns, and tiles whole depths."""
    weight_OI = weight if len(weight.shape) == 2 else weight[None]
    _, panels, _ = few_rows.linear(weight_OI, None).kept
    assert isinstance(panels, Tensor)
    return panels.numel() - weight.numel()


@pytest.mark.parametrize(("name", "dtype"), [("qwen2", torch.bfloat16), ("gpt2", torch.float32)])
def test_every_weight_is_in_memory_once(name: str, dtype: torch.dtype, few_rows: FewRows) -> None:
    """Counted by storages, wherever they are held: modules, sites, terms, and closures of either."""
    base = _tied(name, dtype)
    weights = {id(w): w for w in (base.model.get_submodule(path).weight for path in _matrices(base))}
    least = min(w.numel() for w in weights.values()) * dtype.itemsize
    filled_up = sum(_num_filled_up(few_rows, w) for w in weights.values()) * dtype.itemsize
    before = _bytes_of_storages(base, at_least=least)
    del weights
    base.adapted.pack(few_rows.linear, fewest=1, places=WeightPlaces(base.model))
    gc.collect()
    after = _bytes_of_storages(base, at_least=least)
    assert after <= before + filled_up, "not even the largest is there twice"


def _bytes_of_storages(base: ResidentBase, *, at_least: int) -> int:
    """Of every storage of so many bytes that a tensor of the base, or of what was made of it, refers to."""
    seen: set[int] = set()
    todo: list[object] = [base]
    found: dict[int, int] = {}
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, type | ModuleType):
            continue
        seen.add(id(one))
        if type(one) in (Tensor, nn.Parameter) and one.device.type == "cpu":
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        if isinstance(one, FunctionType):  # what it closes over, and not all its module
            todo += one.__closure__ or ()
        else:
            todo += gc.get_referents(one)
    return sum(num_bytes for num_bytes in found.values() if num_bytes >= at_least)


def test_a_packed_weight_cannot_be_changed(few_rows: FewRows) -> None:
    weight = _packed("llama", few_rows).model.get_submodule("model.layers.0.mlp.up_proj").weight
    before = weight.detach()
    for change in (lambda: weight.zero_(), lambda: weight.copy_(before + 1), lambda: weight.add_(1)):
        with pytest.raises(RuntimeError, match="read-only"):
            change()
    assert torch.equal(torch.zeros_like(before).add_(weight), before), "others may be changed by it"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_that_replaces_a_bias_alone_reads_the_weight_as_before(name: str, few_rows: FewRows) -> None:
    outputs = []
    for base in (ResidentBase(tiny(name), name=name), _packed(name, few_rows)):
        path = "model.layers.0.self_attn.q_proj" if name == "llama" else "transformer.h.0.mlp.c_fc"
        module = base.model.get_submodule(path)
        weight = base.parameter(path, "weight")
        edit = Replace({"weight": weight + 1})
        base.adapted.install(1, Adapter(id=AdapterId("sha256:1"), method="X", sites={path: edit}))
        site = base.adapted.at[path]
        outputs.append(site.dense.own.of(1, torch.ones(2, weight.shape[1 if name == "llama" else 0])))  # type: ignore[attr-defined]
        assert module.weight.shape == weight.shape
    torch.testing.assert_close(*outputs)


def test_what_does_not_give_its_weight_back_takes_no_place() -> None:
    model = tiny("llama")
    before = dict(model.named_parameters())
    WeightPlaces(model).replace(before["lm_head.weight"], lambda x: x, is_turned=False)
    assert model.get_submodule("lm_head").weight is before["lm_head.weight"]
