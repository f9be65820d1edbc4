"""What low-rank methods promise beyond equal logits: pruned ranks, shared projections, tasks, and the cheaper form."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load, save

from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.methods.forms import is_low
from peft_serve.adapters.primitives import Adapter, Affine, Dense
from peft_serve.adapters.records import CONFIG_FILE, WEIGHTS_FILE, CheckpointFiles
from peft_serve.adapters.registry import TASK_FIELD
from peft_serve.adapters.shared_primitives import Rescaled
from tests.adapters.checkpoints import make_base, make_checkpoint, oracle_logits
from tests.adapters.fake_base import FakeBase, adapted_logits

BASE = FakeBase(make_base("llama"))
IDS = torch.arange(3, 12)[None]


def compiled(files: CheckpointFiles) -> Adapter:
    return compile_adapter(inspect(files, BASE, GateLimits()), BASE, GateLimits())


def maps_of(adapter: Adapter) -> list[Rescaled]:
    edits = [edit for edit in adapter.sites.values() if isinstance(edit, Affine)]
    return [one for edit in edits for one in edit.maps if isinstance(one, Rescaled)]


def _pruned(masks: dict[str, list[bool]]) -> tuple[CheckpointFiles, Any]:
    """An AdaLoRA checkpoint of init_r 6 pruned by masks, and what peft makes of the file."""
    _, model = make_checkpoint("adalora", "llama")
    names = [name for name, _ in model.base_model.model.named_parameters() if "lora_E" in name]
    kept = {name: next((mask for end, mask in masks.items() if end in name), [True] * 6) for name in names}
    model.peft_config["default"].rank_pattern = kept
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft takes a site without ranks for a sharded one
        model.save_pretrained(folder)
        config, weights = ((Path(folder) / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE))
        oracle = peft.PeftModel.from_pretrained(make_base("llama"), folder).eval()
    return CheckpointFiles(config=config, weights=weights), oracle


def test_adalora_keeps_its_scale_when_ranks_are_pruned() -> None:
    """Ranks 0, 1, 3 and 6 side by side; the scale is that of the rank before pruning."""
    masks = {
        "0.self_attn.q_proj": [False] * 6,
        "0.self_attn.v_proj": [False, True] + [False] * 4,
        "1.self_attn.q_proj": [True, False] * 3,
    }
    files, oracle = _pruned(masks)
    adapter = compiled(files)
    assert {edit.delta.rank for edit in adapter.sites.values()} == {1, 3, 6}
    assert "model.layers.0.self_attn.q_proj" not in adapter.sites
    expected = oracle_logits(oracle, IDS, IDS)
    assert (adapted_logits(BASE, adapter, IDS, IDS) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("method", ["vera", "pvera"])
def test_adapters_of_one_seed_share_their_projections(method: str) -> None:
    """Saved or drawn again, the projections are the same values under the same key, once for all sites."""
    saved, other, drawn = (
        compiled(make_checkpoint(name, "llama", seed=seed)[0])
        for name, seed in ((method, 1), (method, 2), (f"{method}_unsaved", 1))
    )
    maps = maps_of(saved)
    assert len(maps) == 6
    assert all(one.a_RI is maps[0].a_RI and one.b_OR is maps[0].b_OR for one in maps)
    assert {one.key for adapter in (saved, other, drawn) for one in maps_of(adapter)} == {maps[0].key}
    assert torch.equal(maps[0].a_RI, maps_of(drawn)[0].a_RI)
    assert torch.equal(maps[0].b_OR, maps_of(drawn)[0].b_OR)
    assert not torch.equal(maps[0].outer_O, maps_of(other)[0].outer_O)


def test_other_projections_have_another_key() -> None:
    files, _ = make_checkpoint("vera_unsaved", "llama")
    config = {**json.loads(files.config), "projection_prng_key": 4}
    other = CheckpointFiles(config=json.dumps(config).encode(), weights=files.weights)
    assert maps_of(compiled(files))[0].key != maps_of(compiled(other))[0].key


@pytest.mark.parametrize("task", [0, 1, 2])
def test_poly_mixes_the_skills_of_the_task(task: int) -> None:
    files, oracle = make_checkpoint("poly", "llama")
    inspected = inspect(files, BASE, GateLimits())
    asked = dataclasses.replace(inspected, config=Config({**inspected.config.fields, TASK_FIELD: task}))
    adapter = compile_adapter(asked, BASE, GateLimits())
    with torch.no_grad():
        expected = oracle(input_ids=IDS, task_ids=torch.tensor([task])).logits
    assert (adapted_logits(BASE, adapter, IDS, IDS) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "method", ["loha", "loha_dense", "gralora", "gralora_dense", "hra_dense", "miss", "miss_large"]
)
def test_the_cheaper_form_is_chosen(method: str) -> None:
    """Factors where they cost less than their product, the product where it costs less than they."""
    adapter = compiled(make_checkpoint(method, "llama")[0])
    for path, edit in adapter.sites.items():
        assert isinstance(edit, Affine)
        spec = BASE.sites[path]
        if edit.delta is None:
            (dense,) = edit.maps
            assert isinstance(dense, Dense)
            assert dense.weight_OI.shape == (spec.out_features, spec.in_features)
        else:
            assert not edit.maps
            assert is_low(edit.delta.rank, spec.out_features, spec.in_features)
    is_dense = [edit.delta is None for edit in adapter.sites.values()]
    assert any(is_dense) == method.endswith(("dense", "large"))


def test_uni_lora_counts_its_sites_in_the_order_of_the_model() -> None:
    """The indices that peft saves are those that are drawn again."""
    files, _ = make_checkpoint("unilora_saved", "llama")
    tensors = load(files.weights)
    config = {**json.loads(files.config), "save_indices": False}
    theta = {name: tensor for name, tensor in tensors.items() if name.endswith("theta_d")}
    bare = CheckpointFiles(config=json.dumps(config).encode(), weights=save(theta))
    for mine, other in zip(compiled(files).tensors(), compiled(bare).tensors(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=0)
