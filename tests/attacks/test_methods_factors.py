"""Hostile checkpoints of the methods that are low-rank factors: each is refused with a reason, and costs little."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.methods import METHODS
from peft_serve.adapters.registry import TASK_FIELD, SiteMethod, Whole
from peft_serve.errors import AdapterInvalid
from tests.adapters.making import factors
from tests.attacks.hostile import PREFIX, Q0, admit, base_of, honest, with_config, with_tensors

Change = Callable[[dict[str, Tensor]], None]
SITE = f"{PREFIX}{Q0}."
ATTACKED = tuple(sorted(factors.METHODS.keys() - {"tinylora_embedding"}))  # all but that one act on the site
NASTY: tuple[Any, ...] = (
    *("x", "", [], [1], {}, {"q_proj": "x"}, {"(a+)+$": 1}),
    *(-1, 0, 1, 7, 2**31, 2**64, 2**70, 0.3, 1e300, True),
)


def names_of(method: str) -> list[str]:
    """The tensors of one site, and those of no site."""
    return sorted(n for n in load(honest(method).weights) if n.startswith(SITE) or not n.startswith(PREFIX))


TENSORS = [(method, name) for method in ATTACKED for name in names_of(method)]
EACH_TENSOR = pytest.mark.parametrize(("method", "name"), TENSORS)


def refused(method: str, change: Change, reason: str | None = None) -> None:
    with pytest.raises(AdapterInvalid, match=reason):
        admit(with_tensors(honest(method), change))


@pytest.mark.parametrize("method", ATTACKED)
def test_honest_ones_are_let_in(method: str) -> None:
    assert Q0 in admit(honest(method)).sites


@EACH_TENSOR
def test_missing_tensor(method: str, name: str) -> None:
    refused(method, lambda tensors: tensors.__delitem__(name))


@EACH_TENSOR
def test_wrong_shape(method: str, name: str) -> None:
    """One entry more along each axis, one axis more, and none at all."""
    for axis in range(load(honest(method).weights)[name].dim()):
        refused(method, lambda tensors, a=axis: tensors.update({name: _longer(tensors[name], a)}))
    refused(method, lambda tensors: tensors.update({name: tensors[name][None].clone()}))
    refused(method, lambda tensors: tensors.update({name: tensors[name][:0].clone()}))


def _longer(tensor: Tensor, axis: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] += 1
    return torch.ones(shape, dtype=tensor.dtype)


@EACH_TENSOR
def test_wrong_type(method: str, name: str) -> None:
    """Integers where numbers are expected, numbers where indices are."""
    refused(
        method,
        lambda tensors: tensors.update(
            {name: tensors[name].int() if tensors[name].is_floating_point() else tensors[name].float()}
        ),
        "has dtype",
    )


@pytest.mark.parametrize(("method", "name"), [at for at in TENSORS if load(honest(at[0]).weights)[at[1]].numel()])
def test_values_that_are_no_numbers(method: str, name: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        values = tensors[name].view(-1)
        values[-1] = float("nan") if values.is_floating_point() else torch.iinfo(values.dtype).max

    refused(method, change, "NaN|outside")


@pytest.mark.parametrize("method", ATTACKED)
@pytest.mark.parametrize("name", [f"{SITE}hada_t1", f"{SITE}weights", "base_model.more", "base_model.tinylora_v.7"])
def test_extra_tensor(method: str, name: str) -> None:
    refused(method, lambda tensors: tensors.update({name: torch.ones(2, 2)}))


@pytest.mark.parametrize("method", ATTACKED)
def test_nasty_values_of_every_field(method: str) -> None:
    """Let in or refused: nothing else happens, and nothing large is made."""
    files = honest(method)
    schema = METHODS[json.loads(files.config)["peft_type"]].schema
    for field in sorted({*schema.required, *schema.optional}):
        for value in NASTY:
            with suppress(AdapterInvalid):
                admit(with_config(files, **{field: value}))


@pytest.mark.parametrize("method", ATTACKED)
def test_required_fields(method: str) -> None:
    files = honest(method)
    for field in METHODS[json.loads(files.config)["peft_type"]].schema.required:
        for value in (..., None, "4", [4], {}):
            with pytest.raises(AdapterInvalid, match=field):
                admit(with_config(files, **{field: value}))


REFUSED_CONFIGS = [
    ("adalora", {"init_r": 7}, "shape"),
    ("adalora", {"use_dora": True}, "not defined for AdaLoRA"),
    ("adalora", {"rank_pattern": {f"{Q0}.lora_E": [True] * 5}}, "5 entries"),
    ("adalora", {"rank_pattern": {f"{Q0}.lora_E": [True] * 5 + [False]}}, "shape"),
    ("adalora", {"rank_pattern": {f"{Q0}.lora_E": 6}}, "lists of true and false"),
    ("adalora", {"rank_pattern": {f"{Q0}.lora_E": [1] * 6}}, "lists of true and false"),
    ("adalora", {"megatron_config": {"a": 1}}, "Megatron"),
    ("pvera", {"sample_at_inference": True}, "random"),
    ("vera", {"bias": "pvera_only"}, "vera_only"),
    ("vblora", {"topk": 13}, "13; there are 12"),
    ("vblora", {"vector_length": 7}, "shape"),
    ("unilora", {"r": 33}, "fewer ranks"),
    ("unilora", {"proj_seed": -1}, "integer"),
    ("unilora", {"target_modules": ".*(q_proj|v_proj)"}, "regular expression"),
    ("unilora", {"save_indices": True}, "is missing"),
    ("unilora_saved", {"save_indices": False}, "not a tensor of UNILORA"),
    ("unilora_saved", {"theta_d_length": 399}, "shape"),
    ("tinylora", {"weight_tying": 0.5}, "belongs to no site"),
    ("tinylora", {"weight_tying": 1.5}, "from 0 to 1"),
    ("tinylora_tied", {"weight_tying": 0}, "is missing"),
    ("tinylora", {"save_projection": False}, "not a tensor of TINYLORA"),
    ("delora", {"rank_pattern": {"q_proj": 3}}, "shape"),
    ("gralora", {"gralora_k": 3}, "must divide"),
    ("gralora", {"hybrid_r": 2}, "is missing"),
    ("miss", {"r": 49}, "49; model.layers.0.mlp.down_proj has 48 inputs"),
    ("miss", {"init_weights": "other"}, '"bat" or "mini"'),
    ("miss_mini", {"mini_r": 5}, "does not divide"),
    ("miss_bat", {"r": 7}, "does not divide"),
    ("poly", {"n_splits": 3}, "does not divide"),
    ("poly", {"poly_type": "other"}, "one of poly"),
    ("loha", {"rank_pattern": {"q_proj": 2}}, "shape"),
    ("hra", {"r": 49}, "no more directions"),
]


@pytest.mark.parametrize(("method", "changes", "reason"), REFUSED_CONFIGS)
def test_config_that_does_not_fit(method: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdapterInvalid, match=reason):
        admit(with_config(honest(method), **changes))


def _twice(tensors: dict[str, Tensor]) -> None:
    tensors[f"{SITE}vblora_logits_A_topk_indices"][0, 0, :] = 1


def _widen(prefix: str) -> Change:
    """Projections for a base with wider sites: they go together, and not with this base."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"base_model.{prefix}_A"] = _longer(tensors[f"base_model.{prefix}_A"], 1)

    return change


REFUSED_TENSORS: list[tuple[str, Change, str]] = [
    ("vblora_topk", lambda t: t[f"{SITE}vblora_logits_A_topk_indices"].fill_(12), "outside 0 ... 11"),
    ("vblora_topk", _twice, "twice in one place"),
    ("vblora_many", lambda t: t[f"{SITE}vblora_logits_A_topk_indices"].fill_(-1), "outside 0 ... 299"),
    ("unilora_saved", lambda t: t[f"{SITE}unilora_indices_B"].fill_(400), "outside 0 ... 399"),
    ("unilora_saved", lambda t: t[f"{SITE}unilora_indices_B"].fill_(-1), "outside 0 ... 399"),
    ("vera", _widen("vera"), "serve it on its own base"),
    ("pvera", _widen("pvera"), "serve it on its own base"),
    ("hra", lambda t: t[f"{SITE}hra_u"].zero_(), "not finite after compilation"),
    ("tinylora", lambda t: t.__setitem__("base_model.tinylora_v.6", torch.ones(5)), "belongs to no site"),
    ("tinylora", lambda t: t.__setitem__("base_model.tinylora_v.", torch.ones(5)), "belongs to no site"),
]


@pytest.mark.parametrize(("method", "change", "reason"), REFUSED_TENSORS)
def test_tensors_that_do_not_fit(method: str, change: Change, reason: str) -> None:
    refused(method, change, reason)


@pytest.mark.parametrize("task", [-1, 3, 2**40])
def test_task_that_a_poly_adapter_does_not_hold(task: int) -> None:
    base, limits = base_of("llama"), GateLimits()
    inspected = inspect(honest("poly"), base, limits)
    asked = dataclasses.replace(inspected, config=Config({**inspected.config.fields, TASK_FIELD: task}))
    with pytest.raises(AdapterInvalid, match=r"tasks 0 \.\.\. 2"):
        compile_adapter(asked, base, limits)


def test_rank_beyond_the_operators_limit() -> None:
    """A method that becomes a matrix takes no rank; one that stays low-rank does, LoHa the square of its own."""
    for method, rank in (("loha", 9), ("gralora", 8), ("vblora", 3), ("hra", 4), ("tinylora", 3)):
        with pytest.raises(AdapterInvalid, match=f"has rank {rank}"):
            admit(honest(method), limits=GateLimits(max_rank=2))
    with pytest.raises(AdapterInvalid, match="compiles to rank 3"):
        admit(honest("unilora"), limits=GateLimits(max_rank=2))
    for method in ("vera", "miss_bat", "hra_dense"):
        admit(honest(method), limits=GateLimits(max_rank=2))


def _large_site() -> SiteSpec:
    side = 1 << 24
    return SiteSpec(
        path="q", kind=SiteKind.LINEAR, out_features=side, in_features=side, parameters={"weight": (side, side)}
    )


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("VERA", {"r": 256, "save_projection": False, "projection_prng_key": 0}),
        ("PVERA", {"r": 256, "save_projection": False, "projection_prng_key": 0}),
        ("UNILORA", {"r": 256, "save_indices": False, "proj_seed": 0}),
    ],
)
def test_a_seed_stands_for_no_more_than_fits(method: str, fields: dict[str, Any]) -> None:
    """What is drawn from a seed is bounded before it is drawn, for the file does not bound it."""
    served = METHODS[method]
    assert isinstance(served, SiteMethod)
    assert served.prepare is not None
    shared = {"unilora_theta_d": torch.ones(4)}
    whole = Whole(config=Config(fields), shared=shared, targets=(_large_site(),), base=base_of("llama"))
    with pytest.raises(AdapterInvalid, match="too many"):
        served.prepare(whole)


def test_tiny_lora_draws_no_more_than_fits() -> None:
    served = METHODS["TINYLORA"]
    assert isinstance(served, SiteMethod)
    with pytest.raises(AdapterInvalid, match="too many"):
        served.layout(_large_site(), Config({"r": 256, "u": 1 << 16, "save_projection": False}), {})


def test_only_a_method_that_prunes_may_leave_a_tensor_empty() -> None:
    refused("lora", lambda tensors: tensors.update({f"{SITE}lora_A.weight": torch.ones(0, 32)}), "is empty")
