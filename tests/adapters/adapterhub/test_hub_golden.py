"""Checkpoints that AdapterHub's library saved give what that library computes, alone and side by side."""

from __future__ import annotations

import random

import pytest
import torch

from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.primitives import Adapter
from peft_serve.adapters.sublayer_primitives import Bottleneck
from peft_serve.core import BASE, AdapterId, Reading
from peft_serve.model.base import ResidentBase
from tests.adapters.adapterhub.bases import ENCODERS, FAMILIES, NUM_NEW, SEQ2SEQ, base_model, inputs
from tests.adapters.adapterhub.served import (
    LIMITS,
    PlainModel,
    compiled,
    expected_of,
    forms_of,
    heads_of,
    in_front,
    inspected,
    relative,
    resident,
)
from tests.adapters.checkpoints import make_checkpoint, oracle_logits
from tests.model.driver import Driver, Job
from tests.model.reading_driver import ReadingDriver, Wish

TOLERANCE = 1e-5
GENERATING = tuple(family for family in FAMILIES if family not in ENCODERS)
READING = {"classification": Reading.SEQUENCE, "tagging": Reading.TOKENS, "qa": Reading.SPANS}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_form_alone_and_all_in_one_batch_equal_the_library(family: str) -> None:
    expected, prefixed = expected_of(family), in_front(family)
    forms = [form for form in forms_of(family) if form not in prefixed]
    model = PlainModel(family)
    assert relative(model.run([0])[0], expected["base"]) < TOLERANCE
    for slot, form in enumerate(forms, start=1):
        model.install(slot, compiled(family, form))
        alone = relative(model.run([slot])[0], expected[form])
        assert alone < TOLERANCE, (form, alone)
    mixed = model.run(range(len(forms) + 1))
    for row, form in enumerate(("base", *forms)):
        assert relative(mixed[row], expected[form]) < TOLERANCE, form


def test_every_flag_of_a_bottleneck_is_among_the_forms() -> None:
    edits = [e for form in forms_of("bert") for e in compiled("bert", form).sites.values() if isinstance(e, Bottleneck)]
    assert len({(e.reads, e.keeps) for e in edits}) >= 5
    for told_apart in (
        {e.is_final for e in edits},
        {e.norms_kept for e in edits},
        {e.norm_before is None for e in edits},
        {e.norm_after is None for e in edits},
        {e.scale.numel() == 1 for e in edits},
    ):
        assert told_apart == {True, False}
    assert {"relu", "gelu", "swish", "tanh", "leakyrelu"} >= {e.activation for e in edits} >= {"relu", "leakyrelu"}


def test_the_base_beside_adapters_is_what_it_is_without_them() -> None:
    model = PlainModel("llama")
    before = model.run([0, 0, 0])
    for slot, form in enumerate(("seq", "plus"), start=1):
        model.install(slot, compiled("llama", form))
    assert torch.equal(model.run([0, 1, 2])[0], before[0])
    assert torch.equal(model.run([0, 0, 0]), before)


@pytest.mark.parametrize("family", GENERATING)
def test_generated_tokens_equal_the_library_s(family: str) -> None:
    """Through the resident model: ragged rows, prompts in chunks, a cache, all forms in one batch."""
    expected, forms = expected_of(family), forms_of(family)
    adapters = {AdapterId(form): compiled(family, form) for form in forms}
    driver = Driver(ResidentBase(base_model(family), name="tiny"), adapters)
    assert not driver.install(*adapters).failed_installs
    jobs = [_job(family, adapter) for adapter in (*adapters, BASE)]
    driver.finish(jobs, max_chunk=5)
    for job in jobs[:-1]:
        assert job.output == expected[f"{job.adapter}.tokens"].tolist(), job.adapter


def _job(family: str, adapter: AdapterId) -> Job:
    ids = tuple(inputs(family)["input_ids"][0].tolist())
    if family not in SEQ2SEQ:
        return Job(prompt=ids, num_new=NUM_NEW, adapter=adapter)
    return Job(prompt=resident(family).decoder_start_ids, source=ids, num_new=NUM_NEW, adapter=adapter)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_a_batch_with_peft_s_adapters(family: str) -> None:
    model, expected = PlainModel(family), expected_of(family)
    of_peft: dict[int, torch.Tensor] = {}
    for slot, method in enumerate(("lora", "ia3", "lora_dora"), start=1):
        files, oracle = make_checkpoint(method, family, slot, base=base_model(family))
        model.install(slot, compile_adapter(inspect(files, resident(family), LIMITS), resident(family), LIMITS))
        given = inputs(family)
        of_peft[slot] = oracle_logits(oracle, given["input_ids"], given.get("decoder_input_ids", given["input_ids"]))[0]
    of_hub = {4: "seq", 5: "plus", 6: "ia3", 7: "invertible"}
    for slot, form in of_hub.items():
        model.install(slot, compiled(family, form))
    mixed = model.run(range(8))
    assert relative(mixed[0], expected["base"]) < TOLERANCE
    for slot, wanted in of_peft.items():
        assert relative(mixed[slot], wanted) < TOLERANCE, slot
    for slot, form in of_hub.items():
        assert relative(mixed[slot], expected[form]) < TOLERANCE, form


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_task_heads_equal_the_library_s(family: str) -> None:
    """Through the resident encoder, every head in one batch, beside plain adapters."""
    forms = heads_of(family)
    adapters: dict[AdapterId, Adapter] = {AdapterId(form): compiled(family, form) for form in forms}
    driver = ReadingDriver(ResidentBase(base_model(family), name="tiny"), adapters)
    prompt = tuple(inputs(family)["input_ids"][0].tolist())
    readings = [READING[form.split("_")[1]] for form in forms]
    wishes = [Wish(reading, prompt, AdapterId(form)) for reading, form in zip(readings, forms, strict=True)]
    for form, reading, rows in zip(forms, readings, driver.read(wishes), strict=True):
        assert not isinstance(rows, Exception), (form, rows)
        wanted = expected_of(family)[form]
        found = torch.tensor(rows)
        assert relative(found[0] if reading is Reading.SEQUENCE else found, wanted) < TOLERANCE, form


@pytest.mark.parametrize("family", ENCODERS)
def test_hidden_states_of_a_resident_encoder_equal_the_library_s(family: str) -> None:
    forms = forms_of(family)
    driver = ReadingDriver(
        ResidentBase(base_model(family), name="tiny"), {AdapterId(form): compiled(family, form) for form in forms}
    )
    make = random.Random(3)
    prompt = tuple(inputs(family)["input_ids"][0].tolist())
    others = [Wish(Reading.MEAN, tuple(make.randrange(5, 40) for _ in range(make.randint(1, 20)))) for _ in forms]
    found = driver.read([*(Wish(Reading.LAST, prompt, AdapterId(form)) for form in forms), *others])
    for form, rows in zip(forms, found, strict=False):
        assert not isinstance(rows, Exception), (form, rows)
        assert relative(torch.tensor(rows[0]), expected_of(family)[form][-1]) < TOLERANCE, form


def test_what_the_gate_tells() -> None:
    found = inspected("bert", "head_classification")
    assert found.summary.peft_type == "ADAPTERHUB_BOTTLENECK"
    assert found.summary.task_type == "SEQ_CLS"
    assert found.summary.head is not None
    assert (found.summary.head.task, found.summary.head.num_labels) == ("SEQ_CLS", 3)
    assert found.profile.labels == ("bad", "fair", "good")
    assert found.summary.num_sites == 2
    assert found.summary.modules == ("output",)
    assert inspected("gpt2", "lora").summary.rank == 9
    methods = {form: inspected("bert", form).summary.peft_type for form in ("lora", "ia3", "dora", "both")}
    assert methods == {
        "lora": "ADAPTERHUB_LORA",
        "ia3": "ADAPTERHUB_IA3",
        "dora": "ADAPTERHUB_DORA",
        "both": "ADAPTERHUB_UNION",
    }
