"""Adapters of every dense term on whole models, token for token what each gives on a copy of its own."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import PreTrainedModel

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.primitives import Adapter, Edit, Replace
from peft_serve.core import AdapterId
from peft_serve.model.base import ResidentBase
from tests.adapters.fake_base import FakeBase, adapted
from tests.model.dense_algebra import LINEAR_TERMS, LOOKUP_TERMS, Dice, edit_of
from tests.model.driver import Driver, Job, random_jobs
from tests.model.tiny_models import VOCAB, tiny

FAMILIES = ["llama", "gpt2", "gemma2", "t5", "bart"]
MIXED = [term for term in LINEAR_TERMS if term not in ("replace", "in_scale")]


def edits(base: ResidentBase, term: str, seed: int) -> dict[str, Edit]:
    """The term, or a random one, at most of the sites."""
    make = random.Random(seed)
    found: dict[str, Edit] = {}
    for place, (path, spec) in enumerate(base.sites.items()):
        if make.random() < 0.3 or not _sees_tokens(path):
            continue
        chosen = make.choice(MIXED) if term == "any" else term
        if spec.kind is SiteKind.NORM:
            dice = Dice(seed + place)
            found[path] = Replace({name: dice.gain(shape[0]) for name, shape in spec.parameters.items()})
        elif spec.kind in (SiteKind.LINEAR, SiteKind.CONV1D, SiteKind.EMBEDDING) and _fits(chosen, spec):
            found[path] = edit_of(chosen, spec, seed + place)
    return found


def _sees_tokens(path: str) -> bool:
    return "relative_attention_bias" not in path and path.rpartition(".")[2] not in ("wpe", "embed_positions")


def _fits(term: str, spec: SiteSpec) -> bool:
    """Sizes that divide (a vocabulary of 97 divides by nothing), and rows where the reference knows them."""
    if term == "rows" and spec.has_bias:
        return False
    sizes = {"out_blocks": [spec.out_features], "out_pairs": [spec.out_features], "in_blocks": [spec.in_features]}
    both = [spec.in_features, spec.out_features]
    in_fours = term in ("kronecker", "circulant")
    if spec.kind is SiteKind.EMBEDDING and term not in LOOKUP_TERMS:
        return False
    return all(size % 4 == 0 for size in sizes.get(term, both if in_fours else []))


def generated(model: PreTrainedModel, job: Job) -> list[int]:
    with torch.no_grad():
        if job.source:
            ids = model.generate(
                input_ids=torch.tensor([job.source]),
                decoder_input_ids=torch.tensor([job.prompt]),
                max_new_tokens=job.num_new,
                do_sample=False,
            )
        else:
            ids = model.generate(input_ids=torch.tensor([job.prompt]), max_new_tokens=job.num_new, do_sample=False)
    return ids[0, len(job.prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_one_mixed_batch(family: str) -> None:
    base = ResidentBase(tiny(family), name=family)
    terms = [*MIXED, "any", "any"]
    adapters = {
        AdapterId(f"sha256:{seed}-{term}"): Adapter(
            id=AdapterId(f"sha256:{seed}-{term}"), method="TEST", sites=edits(base, term, seed)
        )
        for seed, term in enumerate(terms)
    }
    driver = Driver(base, adapters, num_blocks=900)
    assert driver.install(*adapters).failed_installs == ()
    names = [*adapters, AdapterId("base")]
    is_seq2seq = base.shape.is_encoder_decoder
    jobs = random_jobs(
        random.Random(3),
        count=2 * len(names),
        vocab=VOCAB,
        start=base.decoder_start_ids,
        has_source=is_seq2seq,
        adapter=lambda i: names[i % len(names)],
    )
    driver.finish(jobs)
    plain = FakeBase(tiny(family))
    plain.sites = base.sites
    models = {id_: adapted(plain, one) for id_, one in adapters.items()}
    differing = 0
    for job in jobs:
        assert job.output == generated(models.get(job.adapter, plain.model), job), job.adapter
        differing += job.output != generated(plain.model, job)
    assert differing > len(jobs) // 2, "the adapters matter"
