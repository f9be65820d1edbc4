"""Rows side by side give, token for token, what each would get alone from the library's own `generate`."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import PreTrainedModel

from peft_serve.model.base import ResidentBase
from peft_serve.model.self_check import difference, probe
from tests.model.driver import Driver, Job, random_jobs
from tests.model.tiny_models import CAUSAL, EVERY, SEQ2SEQ, VOCAB, tiny


def expected(model: PreTrainedModel, job: Job) -> tuple[list[int], list[float]]:
    """What the model alone generates after the job's prompt, and the log-probability of each token."""
    tokens = torch.tensor([job.prompt])
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if job.source:
        source = torch.tensor([job.source])
        inputs = {
            "input_ids": source,
            "attention_mask": torch.ones_like(source),
            "decoder_input_ids": tokens,
        }
    with torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=job.num_new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    output = out.sequences[0, len(job.prompt) :].tolist()
    logprobs = [float(step[0].log_softmax(-1)[t]) for step, t in zip(out.logits, output, strict=True)]
    return output, logprobs


def assert_alone(model: PreTrainedModel, jobs: list[Job]) -> None:
    for job in jobs:
        output, logprobs = expected(model, job)
        assert job.output == output
        assert job.logprobs == pytest.approx(logprobs, abs=2e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_decoder_only_rows_get_what_they_would_get_alone(name: str) -> None:
    driver = Driver(ResidentBase(tiny(name), name=name), seed=1)
    jobs = random_jobs(random.Random(2), count=7, vocab=VOCAB)
    driver.finish(jobs)
    assert_alone(tiny(name), jobs)
    assert len({tuple(job.output) for job in jobs}) > 1, "the jobs must not all say the same"


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoder_rows_get_what_they_would_get_alone(name: str) -> None:
    base = ResidentBase(tiny(name), name=name)
    driver = Driver(base, seed=1)
    jobs = random_jobs(random.Random(3), count=7, vocab=VOCAB, start=base.decoder_start_ids, has_source=True)
    driver.finish(jobs[:3])  # later rows join a step with rows whose source is already encoded
    driver.finish(jobs)
    assert_alone(tiny(name), jobs)
    assert len({tuple(job.output) for job in jobs}) > 1, "the jobs must not all say the same"


@pytest.mark.parametrize("name", EVERY)
def test_logits_differ_from_the_models_own_by_rounding_only(name: str) -> None:
    model = tiny(name)
    probes = probe(model)
    assert difference(ResidentBase(model, name=name), probes) < 3e-5
