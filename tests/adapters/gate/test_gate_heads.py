"""Task heads at the gate: whole, of the right width, for their task, and each place named once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import Inspected, inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.primitives import HeadTask
from peft_serve.adapters.records import CheckpointFiles, HeadFacts
from peft_serve.errors import AdapterInvalid
from peft_serve.model.base import ResidentBase
from tests.model.tiny_encoders import HIDDEN, tiny_encoder

LAYER = "encoder.layer.{}.attention.self.query"
PREFIX = "base_model.model."


def lora(prefix: str = "bert.", layers: tuple[int, ...] = (0, 1)) -> dict[str, Tensor]:
    paths = [f"{PREFIX}{prefix}{LAYER.format(layer)}" for layer in layers]
    factors = {"lora_A.weight": (2, HIDDEN), "lora_B.weight": (HIDDEN, 2)}
    return {f"{path}.{name}": torch.ones(shape) for path in paths for name, shape in factors.items()}


def head(name: str, num_out: int, width: int = HIDDEN) -> dict[str, Tensor]:
    return {f"{PREFIX}{name}.weight": torch.ones(num_out, width), f"{PREFIX}{name}.bias": torch.ones(num_out)}


def checkpoint(tensors: Mapping[str, Tensor], **config: Any) -> CheckpointFiles:
    fields = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["query"],
        "modules_to_save": ["classifier", "score"],
        **config,
    }
    return CheckpointFiles(config=json.dumps(fields).encode(), weights=save(dict(tensors)))


def checked(files: CheckpointFiles, family: str = "bert", task: str = "FEATURE_EXTRACTION") -> Inspected:
    return inspect(files, ResidentBase(tiny_encoder(family, task), name=family), GateLimits())


def refusals(files: CheckpointFiles, family: str = "bert", task: str = "FEATURE_EXTRACTION") -> str:
    with pytest.raises(AdapterInvalid) as refusal:
        checked(files, family, task)
    return "; ".join(f"{error.path} {error.reason}" for error in refusal.value.errors)


def test_a_head_is_bound_compiled_and_told() -> None:
    files = checkpoint({**lora(), **head("classifier", 3)})
    base = ResidentBase(tiny_encoder("bert"), name="bert")
    inspected = inspect(files, base, GateLimits())
    assert inspected.summary.head == HeadFacts("SEQ_CLS", 3)
    assert inspected.summary.num_tensors == 6
    adapter = compile_adapter(inspected, base, GateLimits())
    assert adapter.head is not None
    assert adapter.head.task is HeadTask.SEQUENCE
    assert sorted(adapter.head.state) == ["classifier.bias", "classifier.weight"]
    assert sorted(adapter.sites) == [LAYER.format(0), LAYER.format(1)]


@pytest.mark.parametrize("served", ["FEATURE_EXTRACTION", "SEQ_CLS", "QUESTION_ANS"])
@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_paths_may_say_the_prefix_of_the_body_or_not(prefix: str, served: str) -> None:
    found = checked(checkpoint(lora(prefix), task_type="FEATURE_EXTRACTION", modules_to_save=None), task=served)
    own = "" if served == "FEATURE_EXTRACTION" else "bert."
    assert sorted(found.binding.sites) == [own + LAYER.format(0), own + LAYER.format(1)]


def test_whole_paths_in_the_config_are_understood_however_they_are_spelt() -> None:
    files = checkpoint(lora(layers=(0,)), target_modules=[f"bert.{LAYER.format(0)}"], task_type=None)
    assert list(checked(files).binding.sites) == [LAYER.format(0)]
    cut = checkpoint(lora(layers=(0,)), target_modules=[f"bert.{LAYER.format(i)}" for i in (0, 1)], task_type=None)
    assert "is named by target_modules and has no tensors" in refusals(cut)


def test_one_place_under_two_names_is_refused() -> None:
    both = {**lora("bert."), **lora("")}
    assert "means the same place as" in refusals(checkpoint({**both, **head("classifier", 2)}))


def test_an_empty_place_in_the_body_is_still_refused() -> None:
    assert "target_modules" in refusals(checkpoint({**lora(layers=(0,)), **head("classifier", 2)}))


@pytest.mark.parametrize(
    ("extra", "config", "family", "words"),
    [
        ({}, {}, "bert", "has no classifier.weight"),
        ({}, {"task_type": "QUESTION_ANS"}, "bert", "has no qa_outputs.weight"),
        (head("classifier", 2, 16), {}, "bert", "a task head here has [labels, 32]"),
        ({f"{PREFIX}classifier.weight": torch.ones(HIDDEN)}, {}, "bert", "has shape [32]; a task head here has"),
        ({f"{PREFIX}classifier.weight": torch.ones(2, HIDDEN)}, {}, "bert", "classifier.bias is missing"),
        ({**head("classifier", 2), **head("score", 2)}, {}, "bert", "is not a part of this task head"),
        (head("qa_outputs", 3), {"task_type": "QUESTION_ANS"}, "bert", "a start and an end make two"),
        (head("classifier", 2), {"task_type": "FEATURE_EXTRACTION"}, "bert", "task_type of adapter_config.json is"),
        (head("classifier", 2), {"task_type": None}, "bert", "task_type of adapter_config.json is empty"),
        (head("classifier", 2), {"task_type": "CAUSAL_LM"}, "bert", "generates no text"),
        (head("classifier.dense", 2), {}, "roberta", "has no classifier.out_proj.weight"),
        (head("classifier.out_proj", 2), {}, "roberta", "classifier.dense.weight is missing"),
        (head("classifier", 2), {}, "distilbert", "pre_classifier.weight is missing"),
        (
            {**head("classifier", 2), f"{PREFIX}classifier.weight": torch.ones(2, HIDDEN, dtype=torch.int64)},
            {},
            "bert",
            "integers",
        ),
        (
            {**head("classifier", 2), f"{PREFIX}classifier.bias": torch.tensor([0.0, float("nan")])},
            {},
            "bert",
            "holds NaN",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_wrong_with_a_head_is_said(
    extra: dict[str, Tensor], config: dict[str, Any], family: str, words: str
) -> None:
    own = {"distilbert": "q_lin"}.get(family, "query")
    tensors = lora(f"{family}.")
    if family == "distilbert":
        tensors = {
            f"{PREFIX}distilbert.transformer.layer.{i}.attention.q_lin.{name}": torch.ones(shape)
            for i in (0, 1)
            for name, shape in (("lora_A.weight", (2, HIDDEN)), ("lora_B.weight", (HIDDEN, 2)))
        }
    assert words in refusals(checkpoint({**tensors, **extra}, **{"target_modules": [own], **config}), family)


def test_a_head_may_be_missing_where_the_base_has_one_for_the_task() -> None:
    assert checked(checkpoint(lora()), task="SEQ_CLS").summary.head is None
    assert "has no classifier.weight" in refusals(checkpoint(lora()), task="QUESTION_ANS")


def test_a_lora_on_the_bases_own_head_is_an_edit_of_its_site() -> None:
    on_head = {
        f"{PREFIX}classifier.lora_A.weight": torch.ones(2, HIDDEN),
        f"{PREFIX}classifier.lora_B.weight": torch.ones(2, 2),
    }
    config = {"task_type": None, "modules_to_save": None, "target_modules": ["query", "classifier"]}
    found = checked(checkpoint({**lora(), **on_head}, **config), task="SEQ_CLS")
    assert "classifier" in found.binding.sites
    assert found.summary.head is None


def test_a_pooler_that_no_reading_asks_for_is_told_and_left_out() -> None:
    pooler = {
        f"{PREFIX}pooler.dense.lora_A.weight": torch.ones(2, HIDDEN),
        f"{PREFIX}pooler.dense.lora_B.weight": torch.ones(HIDDEN, 2),
    }
    files = checkpoint({**lora(""), **pooler}, task_type="FEATURE_EXTRACTION", modules_to_save=None)
    found = checked(files, "electra")
    assert any("pooler" in warning for warning in found.summary.warnings)
    assert not any("pooler" in path for path in found.binding.sites)
