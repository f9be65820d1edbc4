"""Task heads at work: whose layer is whose, jobs of several forms at once."""

from __future__ import annotations

import pytest
import torch

from peft_serve.adapters.primitives import Adapter, Affine, Head, HeadTask, LowRank
from peft_serve.core import BASE_SLOT, AdapterId
from peft_serve.model.base import ResidentBase
from peft_serve.model.heads import HeadJob, Heads
from tests.model.tiny_encoders import HIDDEN, tiny_encoder

STATES = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))


def layer(num_out: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_out, HIDDEN, generator=generator), torch.randn(num_out, generator=generator)


def classifier(num_labels: int, seed: int = 0) -> Head:
    weight, bias = layer(num_labels, seed)
    return Head(HeadTask.SEQUENCE, {"classifier.weight": weight, "classifier.bias": bias})


def logits(heads: Heads, slot: int, task: HeadTask = HeadTask.SEQUENCE) -> torch.Tensor:
    head = heads.of(slot, task)
    assert head is not None
    (given,) = heads.run([HeadJob(slot=slot, head=head, states_ND=STATES)])
    return given


@torch.no_grad()
def test_the_bases_own_head_is_its_modules() -> None:
    model = tiny_encoder("roberta", "SEQ_CLS", num_labels=4)
    heads = Heads(ResidentBase(tiny_encoder("roberta", "SEQ_CLS", num_labels=4), name="roberta"))
    torch.testing.assert_close(logits(heads, BASE_SLOT), model.classifier(STATES[:, None]))


@torch.no_grad()
def test_a_bert_head_runs_through_the_pooler_of_the_body() -> None:
    pooler = tiny_encoder("bert").pooler
    base = ResidentBase(tiny_encoder("bert"), name="bert")
    base.adapted.install(1, Adapter(id=AdapterId("x"), method="LORA"))
    heads = Heads(base)
    heads.put(1, classifier(3))
    weight, bias = layer(3, 0)
    torch.testing.assert_close(logits(heads, 1), torch.tanh(pooler.dense(STATES)) @ weight.T + bias)


@torch.no_grad()
def test_an_adapter_acts_on_the_pooler_that_its_head_runs_through() -> None:
    base = ResidentBase(tiny_encoder("bert"), name="bert")
    a_RI, b_OR = torch.randn(2, HIDDEN), torch.randn(HIDDEN, 2)
    sites = {"pooler.dense": Affine(delta=LowRank(a_RI, b_OR))}
    base.adapted.install(2, Adapter(id=AdapterId("x"), method="LORA", sites=sites))
    heads = Heads(base)
    for slot in (1, 2):
        heads.put(slot, classifier(3))
    base.adapted.install(1, Adapter(id=AdapterId("y"), method="LORA"))
    jobs = [HeadJob(slot=s, head=h, states_ND=STATES) for s in (1, 2) if (h := heads.of(s, HeadTask.SEQUENCE))]
    plain, moved = heads.run(jobs)
    weight, bias = layer(3, 0)
    dense = tiny_encoder("bert").pooler.dense
    torch.testing.assert_close(plain, torch.tanh(dense(STATES)) @ weight.T + bias)
    torch.testing.assert_close(moved, torch.tanh(dense(STATES) + STATES @ a_RI.T @ b_OR.T) @ weight.T + bias)


def test_the_act_of_a_deberta_pooler_is_the_configurations() -> None:
    model = tiny_encoder("deberta-v2", "SEQ_CLS")
    model.config.pooler_hidden_act = "tanh"
    dense, last = model.pooler.dense, model.classifier
    with torch.no_grad():
        expected = last(torch.tanh(dense(STATES)))
        torch.testing.assert_close(logits(Heads(ResidentBase(model, name="d")), BASE_SLOT), expected)


def test_heads_of_different_widths_and_depths_run_together() -> None:
    base = ResidentBase(tiny_encoder("bert"), name="bert")
    heads = Heads(base)
    weight, bias = layer(2, 9)
    for slot, head in (
        (1, classifier(5)),
        (2, Head(HeadTask.SPANS, {"qa_outputs.weight": weight, "qa_outputs.bias": bias})),
        (3, classifier(2, seed=4)),
    ):
        base.adapted.install(slot, Adapter(id=AdapterId(f"a{slot}"), method="LORA"))
        heads.put(slot, head)
    tasks = {1: HeadTask.SEQUENCE, 2: HeadTask.SPANS, 3: HeadTask.SEQUENCE}
    jobs = [HeadJob(slot=s, head=h, states_ND=STATES) for s, t in tasks.items() if (h := heads.of(s, t))]
    together = heads.run(jobs)
    assert [x.shape for x in together] == [(3, 5), (3, 2), (3, 2)]
    for job, given in zip(jobs, together, strict=True):
        torch.testing.assert_close(given, heads.run([job])[0])


def test_a_slot_has_its_own_head_or_the_bases_and_only_for_its_task() -> None:
    heads = Heads(ResidentBase(tiny_encoder("distilbert", "TOKEN_CLS", num_labels=3), name="distilbert"))
    assert heads.of(1, HeadTask.TOKENS) is heads.of(BASE_SLOT, HeadTask.TOKENS)
    assert heads.of(1, HeadTask.SEQUENCE) is None
    weight, bias = layer(7, 0)
    heads.put(1, Head(HeadTask.TOKENS, {"classifier.weight": weight, "classifier.bias": bias}))
    assert logits(heads, 1, HeadTask.TOKENS).shape == (3, 7)
    assert logits(heads, BASE_SLOT, HeadTask.TOKENS).shape == (3, 3)
    heads.drop(1)
    assert heads.of(1, HeadTask.TOKENS) is heads.of(BASE_SLOT, HeadTask.TOKENS)


def test_a_head_of_another_family_is_refused() -> None:
    heads = Heads(ResidentBase(tiny_encoder("roberta"), name="roberta"))
    with pytest.raises(ValueError, match="compile it for this base"):
        heads.put(1, classifier(2))
    assert heads.of(1, HeadTask.SEQUENCE) is None
