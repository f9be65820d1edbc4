"""A new method is one function and one decorator: an invented one with shared tensors goes the whole way."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import Base, SiteSpec
from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.primitives import Affine, LowRank
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.adapters.registry import SharedLayout, Site, SiteLayout, Stored, compiles
from tests.adapters.checkpoints import make_base
from tests.adapters.fake_base import FakeBase


def layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:
    return SiteLayout(tensors={"toy_d": ((2,),), "toy_b": ((spec.out_features,),)}, rank=2)


def shared(config: Config, base: Base, stored: Stored) -> SharedLayout:
    widest = max(spec.in_features for spec in base.sites.values())
    return SharedLayout(tensors={"toy_A": (2, widest)})


@compiles("TOY", schema=ConfigSchema(required={"r": rules.integer(2, 2)}), layout=layout, shared=shared)
def toy(site: Site) -> Affine:
    """B = b, A = d * the first columns of the shared projection."""
    a = site.tensors["toy_d"][:, None] * site.shared["toy_A"][:, : site.spec.in_features]
    return Affine(delta=LowRank(a, site.tensors["toy_b"][:, None].expand(-1, 2)))


def test_invented_method_compiles() -> None:
    base = FakeBase(make_base("llama"))
    path = "model.layers.0.self_attn.q_proj"
    tensors = {
        "base_model.toy_A": torch.randn(2, 64),
        f"base_model.model.{path}.toy_d": torch.randn(2),
        f"base_model.model.{path}.toy_b": torch.randn(32),
    }
    config = json.dumps({"peft_type": "TOY", "r": 2}).encode()
    inspected = inspect(CheckpointFiles(config=config, weights=save(tensors)), base, GateLimits(), methods={"TOY": toy})
    assert inspected.summary.num_tensors == 3
    adapter = compile_adapter(inspected, base, GateLimits())
    edit = adapter.sites[path]
    assert isinstance(edit, Affine)
    assert edit.delta is not None
    assert torch.equal(
        edit.delta.a_RI, tensors[f"base_model.model.{path}.toy_d"][:, None] * tensors["base_model.toy_A"][:, :32]
    )
    assert edit.delta.b_OR.t().is_contiguous(), "as the kernels read it"
