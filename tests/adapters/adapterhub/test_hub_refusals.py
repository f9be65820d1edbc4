"""AdapterHub checkpoints that are refused, each by name, with the reason and the way out; hostile ones among them."""

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

from peft_serve.adapters.adapterhub.schemas import ACTIVATIONS
from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.records import CheckpointFiles
from peft_serve.errors import AdapterInvalid, MalformedUpload
from peft_serve.model.terms.bottlenecks import activation_of
from tests.adapters.adapterhub.served import LIMITS, files_of, inspected, resident

Config = dict[str, Any]
State = dict[str, Tensor]
DOWN = "encoder.layer.0.output.adapters.tuned.adapter_down.0.weight"
REFT = "encoder.layer.0.reft_layer.refts.tuned.units.0"
UP = "encoder.layer.1.output.adapters.tuned.adapter_up.weight"


def changed(
    form: str,
    *,
    config: Callable[[Config], object] = lambda _: None,
    state: Callable[[State], object] = lambda _: None,
    family: str = "bert",
) -> CheckpointFiles:
    """A golden checkpoint with its config or its tensors changed in place."""
    files = files_of(family, form)
    fields, tensors = json.loads(files.config), load(files.weights)
    config(fields)
    state(tensors)
    return replace(files, config=json.dumps(fields).encode(), weights=save(tensors))


def reasons(files: CheckpointFiles, family: str = "bert", limits: GateLimits = LIMITS) -> str:
    with pytest.raises(AdapterInvalid) as refused:
        inspect(files, resident(family), limits)
    return "\n".join(f"{refusal.path}: {refusal.reason}" for refusal in refused.value.errors)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("refused_compacter", "config.phm_layer: makes a Compacter"),
        ("refused_vera", "config.vera_d: makes a VeRA"),
    ],
)
def test_methods_that_are_not_static(form: str, words: str) -> None:
    assert words in reasons(files_of("bert", form))


def _set(**fields: Any) -> Callable[[Config], object]:
    return lambda config: config["config"].update(fields)


@pytest.mark.parametrize(
    ("form", "fields", "words"),
    [
        ("seq", {"use_gating": True}, "config.use_gating: averages a gate over the whole sequence"),
        ("seq", {"reduction_factor": 2}, "ask for [8, 16]"),
        ("seq", {"reduction_factor": 0}, "reduction_factor: is '0'; it must be a number above 0"),
        ("seq", {"reduction_factor": {"0": 4}}, "names neither layer 1 nor a default"),
        ("seq", {"reduction_factor": {"0": "x", "default": 4}}, "reduction_factor"),
        ("seq", {"non_linearity": "exp"}, "non_linearity: is 'exp'; it must be one of relu"),
        ("seq", {"scaling": "many"}, "a number, learned or channel"),
        ("seq", {"scaling": "learned"}, "encoder.layer.0.output.scaling: is missing"),
        ("seq", {"mh_adapter": True}, "encoder.layer.0.attention.output.adapter_down.0.weight: is missing"),
        ("seq", {"output_adapter": False}, "is not a tensor that the config describes here"),
        ("seq", {"leave_out": [0]}, "is not a tensor that the config describes here"),
        ("seq", {"leave_out": "0"}, "a list of layer numbers"),
        ("seq", {"ln_before": True}, "adapter_down.1.weight: is missing"),
        ("seq", {"ln_after": True}, "adapter_norm_after.weight: is missing"),
        ("seq", {"residual_before_ln": "post_add", "original_ln_before": False}, "is post_add, which needs"),
        ("seq", {"residual_before_ln": "sum"}, "true, false or post_add"),
        ("seq", {"inv_adapter": "glow", "inv_adapter_reduction_factor": 2}, "it must be one of nice"),
        ("seq", {"inv_adapter": "nice"}, "inv_adapter_reduction_factor: is missing"),
        (
            "seq",
            {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2},
            "invertible_adapters.F.0.weight: is missing",
        ),
        ("invertible", {"inv_adapter_reduction_factor": 100}, "which leaves nothing of 8 features"),
        ("invertible", {"inv_adapter": None}, "is not a tensor that the config describes here"),
        ("seq", {"surprise": 1}, "config.surprise: is a field that this server does not know"),
        ("seq", {"architecture": "prefix_tuning"}, "config.prefix_length: is missing"),
        ("seq", {"architecture": "mtl_lora"}, "shares its matrices among several tasks"),
        ("seq", {"architecture": ["lora"]}, "config.architecture"),
        ("lora", {"r": 4}, "ask for [4, 16]"),
        ("lora", {"attn_matrices": ["q"]}, "is not a tensor that the config describes here"),
        ("lora", {"attn_matrices": ["o"]}, "a list of some of q, k and v"),
        ("lora", {"use_gating": True}, "averages a gate"),
        ("lora", {"use_dora": True}, "m.weight: is missing"),
        ("lora", {"composition_mode": "scale"}, "is scale, which needs r = 1"),
        ("lora", {"composition_mode": "times"}, "one of add, scale"),
        ("dora", {"use_dora": False}, "m.weight: is not a tensor that the config describes here"),
        ("reft_lo", {"prefix_positions": 0}, "prefix_positions: and suffix_positions are 0"),
        ("reft_lo", {"prefix_positions": -1}, "prefix_positions: is '-1'"),
        ("reft_lo", {"suffix_positions": True}, "suffix_positions: is 'True'"),
        ("reft_lo", {"layers": "some"}, "layers: is 'some'; it must be all, or a list of layer numbers"),
        ("reft_lo", {"layers": [1]}, "is not a tensor that the config describes here"),
        ("reft_lo", {"layers": [7]}, "names no place of the served base"),
        ("reft_lo", {"output_reft": False}, "names no place of the served base"),
        ("reft_lo", {"r": 3}, "ask for [3, 16]"),
        ("reft_lo", {"orthogonality": False}, "units.0.projection.weight: is missing"),
        ("reft_lo", {"tied_weights": True}, "is not a tensor that the config describes here"),
        ("reft_lo", {"non_linearity": "exp"}, "non_linearity: is 'exp'; it must be one of relu"),
        ("reft_lo", {"leave_out": [0]}, "config.leave_out: is a field that this server does not know"),
        ("reft_both", {"orthogonality": True}, "parametrizations.weight.original: is missing"),
        ("both", {"configs": []}, "describes no method"),
        ("both", {"configs": 3}, "must be a list of objects"),
    ],
)
def test_fields_that_contradict_tensors_or_the_rules(form: str, fields: Config, words: str) -> None:
    assert words in reasons(changed(form, config=_set(**fields)))


def test_a_union_of_two_bottlenecks() -> None:
    def twice(fields: Config) -> None:
        fields["config"]["configs"][1] = fields["config"]["configs"][0]

    assert "names one method twice" in reasons(changed("both", config=twice))


def test_every_missing_field_that_the_library_needs() -> None:
    for name in ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity"):
        assert f"config.{name}: is missing" in reasons(changed("seq", config=lambda f, n=name: f["config"].pop(n)))
    for name in ("layers", "prefix_positions", "suffix_positions", "r", "orthogonality"):
        assert f"config.{name}: is missing" in reasons(changed("reft_lo", config=lambda f, n=name: f["config"].pop(n)))
    for name in ("r", "alpha"):
        assert f"config.{name}: is missing" in reasons(changed("lora", config=lambda f, n=name: f["config"].pop(n)))
    for name in ("name", "model_type"):
        assert f"{name}: must be a string" in reasons(changed("seq", config=lambda f, n=name: f.pop(n)))
    assert "config by name alone" in reasons(changed("seq", config=lambda f: f.update(config="pfeiffer")))


def _rename(old: str, new: str) -> Callable[[State], object]:
    return lambda state: state.update({new: state.pop(old)})


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (lambda s: s.pop(DOWN), "encoder.layer.0.output.adapter_down.0.weight: is missing"),
        (
            _rename(DOWN, DOWN.replace("tuned", "other")),
            "is no tensor of a bottleneck, a LoRA or a ReFT of the adapter 'tuned'",
        ),
        (_rename(DOWN, DOWN.replace("layer.0", "layer.7")), "names no place of the served base"),
        (_rename(DOWN, DOWN.replace("adapter_down", "gate")), "is not a tensor that the config describes here"),
        (lambda s: s.update({f"bert.{DOWN}": s[DOWN].clone()}), "means the same place as"),
        (lambda s: s.update({DOWN: s[DOWN].T.contiguous()}), "has shape [16, 4]"),
        (lambda s: s.update({DOWN: s[DOWN].long()}), "has dtype torch.int64"),
        (lambda s: s[UP].fill_(float("inf")), "holds NaN, Infinity"),
        (lambda s: s.update({"shared_parameters.tuned.phm_rule": torch.ones(4)}), "is shared by many layers"),
        (lambda s: s.update({"x.prefix_tunings.tuned.wte": torch.ones(4)}), "belongs to prefix tuning"),
        (lambda s: s.update({f"{REFT}.projection.weight": torch.ones(2)}), "is not a tensor that the config describes"),
        (lambda s: s.update({"x.refts.tuned.units.0": torch.ones(4)}), "names no place of the served base"),
        (lambda s: s.update({"encoder.layer.0.output.dense.weight": torch.ones(16, 24)}), "is no tensor of"),
    ],
)
def test_tensors_out_of_place(state: Callable[[State], object], words: str) -> None:
    assert words in reasons(changed("seq", state=state))


def test_the_two_names_of_one_norm_must_agree() -> None:
    name = "encoder.layer.0.output.adapters.tuned.adapter_norm_before.weight"
    assert "both are one parameter" in reasons(changed("norm_before", state=lambda s: s[name].add_(1)))


def test_another_family_than_the_base_s() -> None:
    assert "the served base is a roberta model" in reasons(files_of("bert", "seq"), "roberta")
    assert "the served base is a t5 model" in reasons(
        files_of(
            "llama",
            "seq",
        ),
        "t5",
    )


def test_a_rank_beyond_the_limit() -> None:
    assert "has rank 9" in reasons(files_of("gpt2", "lora"), "gpt2", GateLimits(max_rank=8))


def test_dora_on_gpt2_and_post_add_on_llama() -> None:
    dora = changed("lora", config=_set(use_dora=True), family="gpt2")
    assert "cannot be run by adapters itself on GPT-2" in reasons(dora, "gpt2")
    post_add = changed("kept_normed", config=_set(residual_before_ln="post_add"), family="llama")
    assert "a model with a norm behind its sublayers" in reasons(post_add, "llama")


def test_a_coupling_that_was_trained_with_its_inverse() -> None:
    files = changed("invertible", config=lambda f: f.update(model_class="LlamaAdapterModel"), family="llama")
    assert "whose language head inverts it" in reasons(files, "llama")


def test_a_lora_of_a_library_that_scaled_by_one() -> None:
    files = changed("lora", config=lambda f: f.update(version="adapters.1.0.1"))
    old = compile_adapter(inspect(files, resident("bert"), LIMITS), resident("bert"), LIMITS)
    new = compile_adapter(inspected("bert", "lora"), resident("bert"), LIMITS)
    path = "encoder.layer.0.attention.self.query"
    ratio = new.sites[path].delta.b_OR / old.sites[path].delta.b_OR  # type: ignore[union-attr]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 5 / 3))


HEAD = "head_config.json: config"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"head_type": "multiple_choice"}, f"{HEAD}.head_type: is 'multiple_choice'; served are classification"),
        ({"head_type": ["tagging"]}, f"{HEAD}.head_type"),
        ({"layers": 1}, "is no tensor of the head"),
        ({"layers": 3}, "and model_head.safetensors holds other layers"),
        ({"layers": 10**9}, "an integer from 1 to 9"),
        ({"activation_function": "exp"}, f"{HEAD}.activation_function: is 'exp'"),
        ({"activation_function": ["tanh"]}, f"{HEAD}.activation_function"),
        ({"num_labels": 4}, "ask for ['4', 16]"),
        ({"bias": False}, f"{HEAD}.bias: does not agree"),
        ({"use_pooler": True}, f"{HEAD}.use_pooler"),
        ({"label2id": {"a": 0}}, "must name each of the 3 outputs once"),
        ({"label2id": {"a": 0, "b": 1, "c": 1}}, "must name each of the 3 outputs once"),
        ({"surprise": 1}, f"{HEAD}.surprise: is a field"),
    ],
)
def test_heads_that_contradict_themselves(fields: Config, words: str) -> None:
    files = files_of("bert", "head_classification")
    assert files.head_config is not None
    head = json.loads(files.head_config)
    head["config"] |= fields
    assert words in reasons(replace(files, head_config=json.dumps(head).encode()))


def test_half_a_head() -> None:
    files = files_of("bert", "head_classification")
    assert "model_head.safetensors: is missing" in reasons(replace(files, head_weights=None))
    assert "head_config.json: is missing" in reasons(replace(files, head_config=None))
    with pytest.raises(MalformedUpload, match=r"model_head\.safetensors is not a complete safetensors file.*adapters"):
        inspect(replace(files, head_weights=b"x" * 20), resident("bert"), LIMITS)
    with pytest.raises(MalformedUpload, match=r"^adapter\.safetensors is not a complete"):
        inspect(replace(files, weights=b"x" * 20), resident("bert"), LIMITS)


def test_a_language_head_is_the_base_s_own_or_refused() -> None:
    base = resident("llama")
    about = json.dumps({"config": None, "model_class": "LlamaForCausalLM", "name": None}).encode()
    own = {"lm_head.weight": base.weight("lm_head").clone()}
    files = replace(files_of("llama", "seq"), head_config=about, head_weights=save(own))
    found = inspect(files, base, LIMITS)
    assert found.summary.warnings == ("'lm_head.weight' repeats the base's own values and is not read",)
    own["lm_head.weight"][0, 0] += 1
    assert "is a language head other than the served base's" in reasons(replace(files, head_weights=save(own)), "llama")
    flexible = json.dumps({"config": {"head_type": "causal_lm", "layers": 1}, "name": "tuned"}).encode()
    own["heads.tuned.0.weight"] = own.pop("lm_head.weight")
    refused = replace(files, head_config=flexible, head_weights=save(own))
    assert "is a language head other than the served base's" in reasons(refused, "llama")


def test_every_activation_that_is_let_in_is_known() -> None:
    x = torch.linspace(-3, 3, 7)
    for name in ACTIVATIONS:
        assert activation_of(name)(x).shape == x.shape


HEAD_FIELDS = ("head_type", "layers", "activation_function", "num_labels", "label2id", "use_pooler", "bias")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_FORMS = ("seq", "lora", "both", "reft_both")
_FIELDS = {form: sorted(json.loads(files_of("bert", form).config)["config"]) for form in _FORMS}


@settings(max_examples=120, deadline=None)
@given(data=st.data(), form=st.sampled_from(sorted(_FIELDS)), is_outside=st.booleans(), value=_JSON)
def test_no_config_gets_another_answer_than_yes_or_no(data: Any, form: str, is_outside: bool, value: object) -> None:
    fields = json.loads(files_of("bert", form).config)
    place = fields if is_outside else fields["config"]
    place[data.draw(st.sampled_from(sorted(place) if is_outside else _FIELDS[form]))] = value
    files = replace(files_of("bert", form), config=json.dumps(fields).encode())
    with suppress(AdapterInvalid, MalformedUpload):
        compiled = compile_adapter(inspect(files, resident("bert"), LIMITS), resident("bert"), LIMITS)
        assert compiled.sites


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(HEAD_FIELDS), value=_JSON)
def test_no_head_gets_another_answer_than_yes_or_no(name: str, value: object) -> None:
    files = files_of("bert", "head_classification")
    assert files.head_config is not None
    head = json.loads(files.head_config)
    head["config"][name] = value
    files = replace(files, head_config=json.dumps(head).encode())
    with suppress(AdapterInvalid, MalformedUpload):
        compiled = compile_adapter(inspect(files, resident("bert"), LIMITS), resident("bert"), LIMITS)
        assert compiled.head is not None
        assert compiled.head.state["heads.tanh.1.weight"].shape == (3, 16)
