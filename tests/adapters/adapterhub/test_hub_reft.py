"""ReFT in service: by places in the prompt, in chunks, beside others, after preemption, and never from a cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_serve.adapters.adapterhub.reft import _orthonormal
from peft_serve.adapters.combining import combine
from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.primitives import Adapter, SoftPrompt
from peft_serve.adapters.sublayer_primitives import Intervention
from peft_serve.core import BASE, AdapterId, Reading
from peft_serve.model.base import ResidentBase
from peft_serve.model.routing import Stream
from peft_serve.model.sites import AdaptedSites
from tests.adapters.adapterhub.bases import HIDDEN, NUM_NEW, SEQ2SEQ, base_model, inputs
from tests.adapters.adapterhub.served import (
    LIMITS,
    PlainModel,
    compiled,
    expected_of,
    files_of,
    forms_of,
    inspected,
    relative,
    resident,
)
from tests.adapters.adapterhub.serving import Served
from tests.model.driver import Driver, Job
from tests.model.reading_driver import ReadingDriver, Wish

TOLERANCE = 1e-5
GENERATING = ("gpt2", "llama", "t5", "bart")
PROMPT = tuple(inputs("llama")["input_ids"][0].tolist())


def refts_of(family: str) -> list[str]:
    return [form for form in forms_of(family) if form.startswith(("reft", "prefix_reft"))]


def adapters_of(family: str, *more: str) -> dict[AdapterId, Adapter]:
    return {AdapterId(form): compiled(family, form) for form in (*refts_of(family), *more)}


def on_its_own_base(family: str) -> ResidentBase:
    return ResidentBase(base_model(family), name="tiny")


def interventions(adapter: Adapter) -> list[Intervention]:
    return [edit for edit in adapter.sites.values() if isinstance(edit, Intervention)]


def test_the_golden_files_hold_every_form() -> None:
    edits = [edit for form in refts_of("bert") for edit in interventions(compiled("bert", form))]
    assert {edit.subtracts for edit in edits} == {True, False}
    assert {edit.first.projection_RD is edit.last.projection_RD for edit in edits} == {True, False}
    assert {edit.activation for edit in edits} == {None, "leakyrelu"}
    assert {(edit.num_first, edit.num_last) for edit in edits} >= {(3, 0), (0, 20), (2, 10), (2, 2)}
    paths = compiled("t5", "reft_tied").sites
    assert list(paths) == ["encoder.block.0.reft_layer", "decoder.block.1.reft_layer"]


@pytest.mark.parametrize("family", GENERATING)
def test_logits_of_prompts_in_chunks_equal_the_library_s(family: str) -> None:
    expected = expected_of(family)
    driver = Driver(on_its_own_base(family), adapters_of(family, "seq"))
    assert not driver.install(*driver.adapters).failed_installs
    given = inputs(family)
    prompt = tuple(given["decoder_input_ids" if family in SEQ2SEQ else "input_ids"][0].tolist())
    source = PROMPT if family in SEQ2SEQ else ()
    for chunk in (1, 2, 3, 100):
        forms = [*driver.adapters, BASE]
        jobs = [Job(prompt=prompt, source=source, num_new=1, adapter=form) for form in forms]
        slots = {form: slot for slot, form in enumerate((BASE, *driver.adapters))}
        order = sorted(forms, key=slots.__getitem__)
        for form, rows in zip(order, driver.read(jobs, chunk=chunk), strict=True):
            wanted = expected[form].log_softmax(-1)
            assert relative(torch.tensor(rows), wanted) < TOLERANCE, (form, chunk)


@pytest.mark.parametrize("family", GENERATING)
def test_generation_through_the_scheduler_with_preemption(family: str) -> None:
    expected, adapters = expected_of(family), adapters_of(family, "seq")
    forms = [*adapters, BASE]
    roomy = Served(on_its_own_base(family), adapters)
    plain = roomy.generate(forms, PROMPT, NUM_NEW)
    for form, tokens in zip(forms[:-1], plain, strict=False):
        assert tokens == expected[f"{form}.tokens"].tolist(), form
    # At its end a request has 5 blocks of 4 positions; 3 where the prompt is an encoder's.
    tight = Served(on_its_own_base(family), adapters, num_blocks=8 if family in SEQ2SEQ else 12, max_step_tokens=20)
    assert tight.generate(forms, PROMPT, NUM_NEW) == plain
    assert tight.num_preempted > 0
    chunks = Served(on_its_own_base(family), adapters, max_step_tokens=5)
    assert chunks.generate(forms, PROMPT, NUM_NEW) == plain


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_choices_are_scored_as_generated_tokens_are(family: str) -> None:
    for form in refts_of(family):
        adapter = AdapterId(form)
        adapters = {adapter: compiled(family, form)}
        driver = Driver(on_its_own_base(family), adapters)
        driver.install(adapter)
        job = Job(prompt=PROMPT, num_new=4, adapter=adapter)
        driver.finish([job])
        for max_step_tokens in (64, 2):
            served = Served(on_its_own_base(family), adapters, max_step_tokens=max_step_tokens)
            (score, _) = served.score(adapter, PROMPT, (tuple(job.output), (7, 8, 9)))
            assert score == pytest.approx(sum(job.logprobs), rel=1e-5), form


def test_no_request_begins_with_what_another_one_left() -> None:
    """A token that was generated is edited otherwise than the same token in a prompt."""
    adapter = AdapterId("reft_both")
    adapters = {adapter: compiled("llama", "reft_both")}
    assert not adapters[adapter].footprint(is_encoder_decoder=False).is_causal
    assert compiled("llama", "seq").footprint(is_encoder_decoder=False).is_causal
    served = Served(on_its_own_base("llama"), adapters)
    (answer,) = served.generate([adapter], PROMPT, NUM_NEW)
    longer = (*PROMPT, *answer, 9, 11)
    alone = Served(on_its_own_base("llama"), adapters)
    assert served.generate([adapter], longer, NUM_NEW) == alone.generate([adapter], longer, NUM_NEW)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "deberta-v2"])
def test_rows_of_an_encoder_keep_their_own_bounds(family: str) -> None:
    """Rows of many lengths beside each other, padded ones too; the base's are what they are without adapters."""
    adapters = adapters_of(family)
    wishes = [
        Wish(Reading.MEAN, PROMPT[:length] * repeats, AdapterId(form))
        for form in adapters
        for length, repeats in ((9, 1), (2, 1), (5, 3))
    ]
    wishes += [Wish(Reading.MEAN, PROMPT[:4]), Wish(Reading.LAST, PROMPT, AdapterId("reft_both"))]
    driver = ReadingDriver(on_its_own_base(family), adapters)
    together = driver.read(wishes)
    assert max(driver.num_rows_by_step) > 1
    for wish, found in zip(wishes, together, strict=True):
        only = adapters if wish.adapter != BASE else {}
        (alone,) = ReadingDriver(on_its_own_base(family), only).read([wish])
        assert not isinstance(found, Exception)
        assert not isinstance(alone, Exception)
        assert relative(torch.tensor(found), torch.tensor(alone)) < TOLERANCE, wish
    last = together[-1]
    assert not isinstance(last, Exception)
    assert relative(torch.tensor(last[0]), expected_of(family)["reft_both"][-1]) < TOLERANCE


def test_readings_of_a_decoder_s_prompt_in_chunks() -> None:
    adapters = adapters_of("llama")
    wishes = [Wish(reading, PROMPT, AdapterId(form)) for form in adapters for reading in (Reading.LAST, Reading.MEAN)]
    whole = ReadingDriver(on_its_own_base("llama"), adapters).read(wishes)
    parts = ReadingDriver(on_its_own_base("llama"), adapters, max_step_tokens=4).read(wishes)
    for wish, one, other in zip(wishes, whole, parts, strict=True):
        assert not isinstance(one, Exception)
        assert not isinstance(other, Exception)
        assert relative(torch.tensor(one), torch.tensor(other)) < TOLERANCE, wish


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_soft_prompt_in_front_is_not_of_the_sequence(family: str) -> None:
    prompt_PD = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(5))
    soft = Adapter(id=AdapterId("soft"), method="PROMPT_TUNING", prompt=SoftPrompt(prompt_PD))
    both = AdapterId("both")
    adapters = {both: combine([(soft, 1.0), (compiled(family, "reft_both"), 1.0)], both), soft.id: soft}
    driver = ReadingDriver(on_its_own_base(family), adapters, max_step_tokens=64 if family == "bert" else 4)
    for name, rows in zip(adapters, driver.read([Wish(Reading.LAST, PROMPT, name) for name in adapters]), strict=True):
        assert not isinstance(rows, Exception)
        assert relative(torch.tensor(rows[0]), _behind(family, prompt_PD, adapters[name])) < TOLERANCE, name


@torch.no_grad()
def _behind(family: str, prompt_PD: Tensor, adapter: Adapter) -> Tensor:
    """The last hidden state of the prompt behind a soft prompt, with the model's layers edited by hand."""
    model: Any = base_model(family)
    for path, edit in adapter.sites.items():
        assert isinstance(edit, Intervention)
        layer = model.get_submodule(path.removesuffix(".reft_layer"))
        layer.register_forward_hook(partial(_by_hand, edit, len(prompt_PD)))
    embedded = model.get_input_embeddings()(torch.tensor(PROMPT))
    states: Tensor = model.base_model(inputs_embeds=torch.cat((prompt_PD, embedded))[None]).last_hidden_state
    return states[0, -1]


def _by_hand(edit: Intervention, num_virtual: int, _layer: object, _args: object, given: Any) -> Any:
    states = given if isinstance(given, Tensor) else given[0]
    first, last = slice(num_virtual, num_virtual + edit.num_first), slice(states.shape[1] - edit.num_last, None)
    for unit, places in ((edit.first, first), (edit.last, last)):
        x = states[:, places].clone()
        low = x @ unit.source_RD.T + unit.source_bias_R - x @ unit.projection_RD.T
        states[:, places] = x + low @ unit.projection_RD
    return given


def test_layers_are_hooked_only_while_an_adapter_is_there() -> None:
    model = base_model("llama")
    sites = AdaptedSites(model, stream_of=resident("llama").runs.stream_of)
    layers = list(model.model.layers)
    sites.install(1, compiled("llama", "reft_lo"))
    sites.install(2, compiled("llama", "reft_both"))
    assert [len(layer._forward_hooks) for layer in layers] == [1, 1]
    sites.remove(1)
    sites.install(3, compiled("llama", "invertible"))
    sites.remove(2)
    assert not any(layer._forward_hooks for layer in layers)
    sites.install(2, compiled("llama", "reft_both"))
    sites.close()
    assert not any(layer._forward_hooks for layer in layers)


def test_a_step_without_interventions_asks_for_no_extents() -> None:
    model = base_model("llama")
    sites = AdaptedSites(model, stream_of=resident("llama").runs.stream_of)
    sites.install(1, compiled("llama", "reft_lo"))
    sites.install(2, compiled("llama", "lora"))

    def unasked() -> list[Any]:
        raise AssertionError("nobody is here who wants to know")

    sites.route(Stream.TARGET, [(0, 3), (2, 4)], unasked)
    with pytest.raises(AssertionError, match="nobody is here"):
        sites.route(Stream.TARGET, [(1, 3), (2, 4)], unasked)


def test_the_base_beside_interventions_is_what_it_is_without_them() -> None:
    model = PlainModel("gpt2")
    before = model.run([0, 0])
    model.install(1, compiled("gpt2", "reft_both"))
    assert torch.equal(model.run([0, 1])[0], before[0])
    assert torch.equal(model.run([0, 0]), before)


def test_a_direft_file_without_its_field_is_read_as_the_library_reads_it() -> None:
    for family in ("bert", "gpt2", "llama", "t5"):
        files = files_of(family, "reft_di")
        fields = json.loads(files.config)
        del fields["config"]["subtract_projection"]
        files = replace(files, config=json.dumps(fields).encode())
        base = resident(family)
        model = PlainModel(family)
        model.install(1, compile_adapter(inspect(files, base, LIMITS), base, LIMITS))
        assert relative(model.run([1])[0], expected_of(family)["reft_di.loaded"]) < TOLERANCE, family


def test_what_the_gate_tells() -> None:
    found = inspected("llama", "reft_both").summary
    assert (found.peft_type, found.rank, found.num_sites, found.modules) == ("ADAPTERHUB_REFT", 2, 2, ("reft_layer",))
    assert inspected("llama", "reft_union").summary.peft_type == "ADAPTERHUB_UNION"


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (5, 5), (1, 8)])
def test_the_orthogonal_parametrisation_is_torch_s(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    layer: Any = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(shape[1], shape[0], bias=False))
    parts = layer.parametrizations.weight
    with torch.no_grad():
        parts.original.add_((0.4 * torch.randn(shape)).fill_diagonal_(0.0))
    torch.testing.assert_close(_orthonormal(parts.original.detach(), parts[0].base), layer.weight.detach())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: replace(e, first=replace(e.first, source_RD=torch.zeros(2, 5))), r"first.source has shape \[2, 5\]"),
        (
            lambda e: replace(e, last=replace(e.last, projection_RD=torch.zeros(1, HIDDEN))),
            r"last.projection has shape \[1, 16\]",
        ),
        (lambda e: replace(e, num_last=-1), "counts 2 first and -1 last positions"),
        (
            lambda e: replace(e, first=replace(e.first, source_bias_R=torch.full((2,), float("nan")))),
            "not finite",
        ),
    ],
)
def test_interventions_that_do_not_fit(change: Callable[[Intervention], Intervention], words: str) -> None:
    sites = AdaptedSites(base_model("llama"), stream_of=resident("llama").runs.stream_of)
    adapter = compiled("llama", "reft_both")
    (path, edit) = next(iter(adapter.sites.items()))
    assert isinstance(edit, Intervention)
    with pytest.raises(ValueError, match=words):
        sites.install(1, replace(adapter, sites={path: change(edit)}))
    bottleneck = compiled("llama", "seq").sites["model.layers.0.output_adapters"]
    with pytest.raises(ValueError, match="is a layer, which is no place for Bottleneck"):
        sites.install(1, replace(adapter, sites={path: bottleneck}))
