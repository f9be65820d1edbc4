"""Hostile checkpoints of methods that change the weight itself: each is refused with a reason, nothing else happens."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.methods import METHODS
from peft_serve.errors import AdapterInvalid
from tests.adapters.checkpoints import make_base
from tests.adapters.fake_base import FakeBase
from tests.attacks.hostile import PREFIX, admit, honest, with_config, with_tensors

ON = {
    "deft_qr": "llama",
    "fourierft": "gpt2",
    "waveft": "llama",
    "waveft_proportional": "llama",
    "randlora": "llama",
    "randlora_unsaved": "gpt2",
    "hira_everywhere": "llama",
    "frod": "llama",
    "psoft": "llama",
    "psoft_plain": "t5",
    "osf_patterns": "llama",
    "peanut_deep": "llama",
    "adamss": "llama",
    "adamss_biased": "opt",
    "lokr": "llama",
    "lokr_both": "llama",
    "shira": "llama",
    "supertuning": "llama",
    "supertuning_supra": "llama",
    "c3a_patterns": "llama",
    "glora": "llama",
    "glora_biased": "opt",
    "glora_biased_only": "opt",
    "glora_vector": "llama",
}
LEFTOVERS = ("randlora_A", "randlora_B")  # repeated at every site, read at none
NASTY: tuple[Any, ...] = (
    None,
    "x",
    "",
    [],
    [1],
    {},
    {"q_proj": "x"},
    {"(a+)+$": 1},
    -1,
    0,
    True,
    1 << 20,
    1 << 62,
    1e30,
)


def _cases() -> list[tuple[str, str]]:
    """Every kind of tensor of every method: its name at the first place that has it."""
    found: dict[tuple[str, str], str] = {}
    for method, kind in ON.items():
        for name in sorted(load(honest(method, kind).weights)):
            site, _, suffix = name.rpartition("_proj.") if "_proj." in name else ("", "", name)
            suffix = suffix if site else name.rpartition(".")[2] if name.startswith(PREFIX) else name.partition(".")[2]
            if not suffix.startswith(LEFTOVERS) or not site:
                found.setdefault((method, suffix), name)
    return [(method, name) for (method, _), name in found.items() if not _is_read_nowhere(name)]


def _is_read_nowhere(name: str) -> bool:
    return name.startswith(PREFIX) and name.rpartition(".")[2] in (*LEFTOVERS, "weight") and "base_layer" in name


CASES = _cases()


def _refused(method: str, change: Callable[[dict[str, Tensor]], None]) -> AdapterInvalid:
    kind = ON[method]
    with pytest.raises(AdapterInvalid) as refused:
        admit(with_tensors(honest(method, kind), change), kind)
    assert all(error.reason and len(error.reason) < 600 for error in refused.value.errors)
    return refused.value


@pytest.mark.parametrize(("method", "name"), CASES)
def test_missing_tensor(method: str, name: str) -> None:
    _refused(method, lambda tensors: tensors.__delitem__(name))


@pytest.mark.parametrize(("method", "name"), CASES)
def test_tensor_that_no_config_speaks_of(method: str, name: str) -> None:
    _refused(method, lambda tensors: tensors.__setitem__(f"{name}x", torch.ones(2, 2)))


@pytest.mark.parametrize(("method", "name"), CASES)
def test_wrong_shape(method: str, name: str) -> None:
    def longer(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.cat([tensors[name], tensors[name][..., -1:]], dim=-1)

    def deeper(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][None]

    def single(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].flatten()[:1]

    for change in (longer, deeper, single):
        if change is single and load(honest(method, ON[method]).weights)[name].shape == (1,):
            continue
        _refused(method, change)


@pytest.mark.parametrize(("method", "name"), CASES)
def test_wrong_numbers(method: str, name: str) -> None:
    def turned(tensors: dict[str, Tensor]) -> None:
        other = torch.int32 if tensors[name].is_floating_point() else torch.float32
        tensors[name] = tensors[name].to(other)

    assert "dtype" in str(_refused(method, turned).errors)


@pytest.mark.parametrize(("method", "name"), CASES)
@pytest.mark.parametrize("value", [0.0, -65504.0])
def test_extreme_values_are_compiled_or_refused(method: str, name: str, value: float) -> None:
    def fill(tensors: dict[str, Tensor]) -> None:
        if tensors[name].is_floating_point():
            tensors[name] = torch.full_like(tensors[name], value)

    try:
        adapter = admit(with_tensors(honest(method, ON[method]), fill), ON[method])
    except AdapterInvalid:
        return
    assert all(bool(torch.isfinite(t).all()) for t in adapter.tensors() if t.is_floating_point())


@pytest.mark.parametrize("method", ON)
def test_config_of_any_kind_is_compiled_or_refused(method: str) -> None:
    files = honest(method, ON[method])
    config = json.loads(files.config)
    schema = METHODS[config["peft_type"]].schema
    started = time.monotonic()
    for field in (*schema.required, *schema.optional):
        for value in NASTY:
            with suppress(AdapterInvalid):  # any other exception is a hole
                admit(with_config(files, **{field: value}), ON[method])
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("method", ON)
def test_required_field_left_out(method: str) -> None:
    files = honest(method, ON[method])
    for field in METHODS[json.loads(files.config)["peft_type"]].schema.required:
        with pytest.raises(AdapterInvalid, match=field):
            admit(with_config(files, **{field: ...}), ON[method])


@pytest.mark.parametrize("method", ON)
def test_unknown_field(method: str) -> None:
    with pytest.raises(AdapterInvalid, match="does not know"):
        admit(with_config(honest(method, ON[method]), a_field_of_tomorrow=1), ON[method])


@pytest.mark.parametrize(
    ("method", "ending", "place", "value"),
    [
        ("shira", "q_proj.shira_indices", 0, 32),
        ("shira", "v_proj.shira_indices", 0, 16),  # an input it would be, as an output it is none
        ("shira", "down_proj.shira_indices", 1, 48),
        ("shira", "q_proj.shira_indices", 0, -1),
        ("supertuning", "q_proj.supertuning_indices", ..., 32 * 32),
        ("supertuning", "q_proj.supertuning_indices", ..., -1),
        ("frod", "frod_s_indices.self_attn_q_proj", 1, 32),
        ("frod", "frod_s_indices.self_attn_q_proj", 1, -5),
        ("frod", "frod_s_size.self_attn_q_proj", ..., 31),
        ("frod", "frod_s_size.self_attn_q_proj", ..., 1 << 40),
    ],
)
def test_index_that_points_outside(method: str, ending: str, place: Any, value: int) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in sorted(tensors) if name.endswith(ending))
        tensors[name][place] = value

    assert ending.rpartition(".")[2] in str(_refused(method, change).errors)


@pytest.mark.parametrize(
    ("method", "fields", "reason"),
    [
        ("psoft", {"r": 17}, "fewer ranks"),  # v_proj has 16 outputs
        ("psoft", {"psoft_alpha": 0}, "above 0"),
        ("psoft", {"psoft_svd": "lowrank"}, "signs"),
        ("osf_patterns", {"effective_rank": 1 << 20}, "shape"),
        ("osf_patterns", {"effective_rank": 1e-9}, "keep one"),
        ("fourierft", {"n_frequency": 32 * 96 + 1}, "entries"),
        ("waveft", {"n_frequency": 1 << 40}, "entries"),
        ("waveft", {"wavelet_family": "coif5"}, "no working filter"),
        ("waveft", {"wavelet_family": "db11"}, "no working filter"),
        ("waveft_proportional", {"n_frequency": 30}, "share"),
        ("c3a_patterns", {"block_size": 7}, "does not divide"),
        ("shira", {"r": 17}, "asks for"),
        ("supertuning", {"sparsity": 0.99999}, "leaves no entry"),
        ("randlora", {"r": 1 << 20}, "do not go together"),
        ("randlora_unsaved", {"r": 1 << 20}, "fewer ranks"),
        ("frod", {"save_projection": False}, "eigenvectors"),
        ("glora", {"bias": "all"}, "not served"),
        ("peanut_deep", {"act_fn": "prelu"}, "one of"),
        ("adamss", {"random_seed": 6}, "very base"),
        ("hira_everywhere", {"r": 300}, "max-rank|shape"),
    ],
)
def test_config_that_does_not_fit(method: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdapterInvalid) as refused:
        admit(with_config(honest(method, ON[method]), **fields), ON[method])
    assert re.search(reason, str([error.reason for error in refused.value.errors]))


def test_unused_path_of_glora_that_holds_something() -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in sorted(tensors) if name.endswith("glora_A.zeros"))
        tensors[name][0, 0] = 1

    assert "unused path" in str(_refused("glora_biased_only", change).errors)


def test_clusters_of_another_base() -> None:
    def other_sizes(tensors: dict[str, Tensor]) -> None:
        first, second = (f"{PREFIX}model.layers.0.mlp.down_proj.adamss_B.{k}" for k in (0, 1))
        moved = tensors[first][-1:]
        tensors[first], tensors[second] = tensors[first][:-1].clone(), torch.cat([tensors[second], moved])

    assert "other sizes" in str(_refused("adamss", other_sizes).errors)


def test_ranks_of_a_cluster_disagree() -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        name = f"{PREFIX}model.layers.0.mlp.down_proj.adamss_A.0"
        tensors[name] = tensors[name][:1].clone()

    assert "shape" in str(_refused("adamss", change).errors)


def test_singular_basis_is_taken_as_peft_takes_it_or_refused() -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.frod_V.self_attn_q_proj"].zero_()

    adapter = admit(with_tensors(honest("frod"), change))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in adapter.tensors())


class CountingBase(FakeBase):
    """Counts how often a weight is asked for."""

    asked = 0

    def weight(self, path: str) -> Tensor:
        self.asked += 1
        return super().weight(path)


def test_a_small_file_that_stands_for_large_matrices_is_stopped_on_the_way() -> None:
    files = honest("hira")
    base = CountingBase(make_base("llama"))
    limits = GateLimits(max_adapter_bytes=len(files.weights) + 4096)
    with pytest.raises(AdapterInvalid, match="bytes when compiled"):
        inspect(files, base, limits)
    assert base.asked == 0, "the gate knows it from the shapes"
    inspected = inspect(files, base, GateLimits())
    assert inspected.summary.num_sites == 6
    base.asked = 0
    with pytest.raises(AdapterInvalid, match="max-adapter-bytes"):
        compile_adapter(inspected, base, limits)
    assert base.asked < 6


def test_without_scikit_learn_only_the_method_that_needs_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    files, others = honest("adamss"), honest("psoft")
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)  # which is how an import finds nothing
    with pytest.raises(AdapterInvalid) as refused:
        admit(files)
    assert "peft-serve[adamss]" in str(refused.value.errors)
    admit(others)
