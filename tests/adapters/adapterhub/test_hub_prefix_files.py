"""What a file with a prefix of AdapterHub's must hold, and what is said of one that does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor
from transformers.activations import ACT2FN

from peft_serve.adapters.adapterhub.prefixes import ACTIVATIONS
from peft_serve.adapters.adapterhub.schemas import ACTIVATIONS as LET_IN
from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.primitives import KVPrefix
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.errors import AdapterInvalid, MalformedUpload
from tests.adapters.adapterhub.served import LIMITS, compiled, files_of, inspected, resident

Fields = dict[str, Any]
State = dict[str, Tensor]
POOL = "prefix_tuning.prefix_tunings.tuned.self_prefix"
COPY = "encoder.layer.1.attention.self.prefix_tuning.pool.prefix_tunings.tuned.self_prefix"
SECOND = f"{POOL}.control_trans.2.bias"


def changed(
    form: str = "prefix",
    *,
    config: Callable[[Fields], object] = lambda _: None,
    state: Callable[[State], object] = lambda _: None,
    family: str = "bert",
) -> CheckpointFiles:
    files = files_of(family, form)
    fields, tensors = json.loads(files.config), load(files.weights)
    config(fields["config"])
    state(tensors)
    return replace(files, config=json.dumps(fields).encode(), weights=save(tensors))


def reasons(files: CheckpointFiles, family: str = "bert", limits: GateLimits = LIMITS) -> str:
    with pytest.raises(AdapterInvalid) as refused:
        inspect(files, resident(family), limits)
    return "\n".join(f"{refusal.path}: {refusal.reason}" for refusal in refused.value.errors)


@pytest.mark.parametrize(
    ("form", "fields", "words"),
    [
        ("prefix", {"use_gating": True}, "config.use_gating: averages a gate"),
        ("prefix", {"prefix_length": 4}, "has shape [5, 16]; config and base 'tiny' ask for [4, 16]"),
        ("prefix", {"prefix_length": 0}, "config.prefix_length: is '0'; it must be an integer from 1"),
        ("prefix", {"bottleneck_size": 5}, "ask for [5, 16]"),
        ("prefix", {"non_linearity": "exp"}, "config.non_linearity: is 'exp'"),
        ("prefix", {"flat": True}, "self_prefix.control_trans: is missing"),
        ("prefix", {"leave_out": [1]}, "ask for [32, 4]"),
        ("prefix", {"leave_out": "1"}, "a list of layer numbers"),
        ("prefix", {"leave_out": [0, 1]}, "names no attention of a bert model"),
        ("prefix", {"surprise": 1}, "config.surprise: is a field that this server does not know"),
        ("prefix_flat", {"flat": False}, "self_prefix.wte.weight: is missing"),
        ("prefix_flat", {"prefix_length": 4}, "has shape [192]"),
        ("prompt", {"prompt_length": 2}, "has shape [3, 16]; config and base 'tiny' ask for [2, 16]"),
        ("prompt", {"combine": "prefix_after_bos"}, "it must be one of prefix"),
        ("prompt_union", {"configs": []}, "describes no method"),
    ],
)
def test_fields_that_contradict_tensors_or_the_rules(form: str, fields: Fields, words: str) -> None:
    assert words in reasons(changed(form, config=lambda config: config.update(fields)))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (lambda s: s[f"{COPY}.wte.weight"].add_(1), "and both are one parameter"),
        (lambda s: s.update({SECOND: s[SECOND].half()}), "and both are one parameter"),
        (lambda s: s.update({f"{POOL}.more": torch.ones(2)}), "is not a tensor that the config describes"),
        (lambda s: s.update({SECOND.replace("tuned", "other"): s.pop(SECOND)}), "that the config does not describe"),
        (lambda s: s[SECOND].fill_(float("nan")), "holds NaN, Infinity"),
        (
            lambda s: s.update({"encoder.layer.0.attention.self.prefix_tuning.prefix_gates.tuned.bias": torch.ones(1)}),
            "belongs to a gated method",
        ),
    ],
)
def test_tensors_out_of_place(state: Callable[[State], object], words: str) -> None:
    assert words in reasons(changed(state=state))


def test_one_copy_of_a_tensor_will_do_whichever_it_is() -> None:
    """The library's own keys are many for one parameter, and a tool that drops twins keeps any of them."""
    whole = compiled("bert", "prefix").prefix
    for kept in (POOL, COPY):
        files = changed(state=lambda s, kept=kept: [s.pop(name) for name in list(s) if not name.startswith(kept)])
        assert len(load(files.weights)) == 5
        found = compile_adapter(inspect(files, resident("bert"), LIMITS), resident("bert"), LIMITS).prefix
        assert isinstance(whole, KVPrefix)
        assert isinstance(found, KVPrefix)
        assert torch.equal(found.keys_LHPD, whole.keys_LHPD)


def test_the_copies_are_counted_as_what_is_bound() -> None:
    found = inspected("bert", "prefix").summary
    assert found.peft_type == "ADAPTERHUB_PREFIX_TUNING"
    assert (found.num_tensors, found.num_sites, found.num_virtual_tokens) == (15, 0, 0)
    union = inspected("bert", "mam").summary
    assert union.peft_type == "ADAPTERHUB_UNION"
    assert (union.num_tensors, union.num_sites) == (23, 2)


def test_a_longer_prefix_than_the_operator_allows() -> None:
    assert "--max-virtual-tokens 4" in reasons(files_of("bert", "prefix"), limits=GateLimits(max_virtual_tokens=4))


def test_layers_left_out_where_distances_are_counted() -> None:
    some = changed("prefix_flat", config=lambda config: config.update(leave_out=[0]), family="t5")
    assert "adapters then drops the bias of all distances" in reasons(some, "t5")
    kept = compiled("t5", "prefix_encoder")
    assert kept.prefix is None, "both layers of the decoder are left out"
    assert kept.cross_prefix is None
    assert kept.source_prefix is not None


def test_a_model_whose_attention_cannot_have_one() -> None:
    files = files_of("deberta-v2", "seq")
    fields = json.loads(files.config)
    fields["config"] = json.loads(files_of("bert", "prefix").config)["config"]
    weights = files_of("bert", "prefix").weights
    found = reasons(replace(files, config=json.dumps(fields).encode(), weights=weights), "deberta-v2")
    assert "names no attention of a deberta-v2 model" in found


def test_a_prompt_where_the_library_or_the_server_has_none() -> None:
    found = reasons(files_of("deberta-v2", "refused_prompt"), "deberta-v2")
    assert "is prompt tuning, which is not served on deberta-v2 models" in found
    files = files_of("gpt2", "lora")
    fields = json.loads(files.config)
    fields["config"] = json.loads(files_of("bert", "prompt").config)["config"]
    assert "not served on gpt2 models" in reasons(replace(files, config=json.dumps(fields).encode()), "gpt2")


def test_a_prompt_that_the_config_does_not_name() -> None:
    tensor = {"prompt_tuning.prompt_tunings.tuned.prompt_embedding.weight": torch.ones(3, 16)}
    assert "belongs to prompt tuning that the config does not" in reasons(changed(state=lambda s: s.update(tensor)))


def test_a_prompt_and_reft_in_one_union() -> None:
    def both(config: Fields) -> None:
        config["configs"][1] = json.loads(files_of("bert", "reft_lo").config)["config"]

    assert "whose first positions would be the prompt's" in reasons(changed("prompt_union", config=both))


def test_what_is_told_of_a_prompt() -> None:
    assert inspected("bert", "prompt").summary.peft_type == "ADAPTERHUB_PROMPT_TUNING"
    prompt = compiled("electra", "prompt").prompt
    assert prompt is not None
    assert prompt.is_bare
    assert prompt.embeddings_PD.shape == (3, 8), "as wide as the embeddings, which ELECTRA then projects"


def test_two_prefixes_in_one_union() -> None:
    def twice(config: Fields) -> None:
        config["configs"][1] = config["configs"][0]

    assert "names one method twice" in reasons(changed("prefix_lora", config=twice))


def test_every_activation_that_is_let_in_is_the_library_s() -> None:
    x = torch.linspace(-4, 4, 41)
    assert set(ACTIVATIONS) == set(LET_IN)
    for name, function in ACTIVATIONS.items():
        wanted = torch.nn.functional.leaky_relu(x) if name == "leakyrelu" else ACT2FN[name](x)
        torch.testing.assert_close(function(x), wanted, msg=name)


_JSON = st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.lists(st.integers(), max_size=3)
_FIELDS = {form: sorted(json.loads(files_of("bert", form).config)["config"]) for form in ("prefix", "mam", "prompt")}


@settings(max_examples=100, deadline=None)
@given(data=st.data(), form=st.sampled_from(sorted(_FIELDS)), value=_JSON)
def test_no_config_gets_another_answer_than_yes_or_no(data: Any, form: str, value: object) -> None:
    name = data.draw(st.sampled_from(_FIELDS[form]))
    files = changed(form, config=lambda config: config.update({name: value}))
    with suppress(AdapterInvalid, MalformedUpload):
        adapter = compile_adapter(inspect(files, resident("bert"), LIMITS), resident("bert"), LIMITS)
        assert adapter.sites or adapter.prefix is not None or adapter.prompt is not None
