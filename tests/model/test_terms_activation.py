"""Adapters that act from an invocation sequence on, token for token what peft's generate gives."""

from __future__ import annotations

import random

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_serve.adapters.primitives import Adapter, Affine, LowRank
from peft_serve.core import AdapterId
from peft_serve.model.base import ResidentBase
from tests.model.driver import Driver, Job
from tests.model.tiny_models import VOCAB, tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PAIR, TRIPLE, ALWAYS = AdapterId("sha256:pair"), AdapterId("sha256:triple"), AdapterId("sha256:always")
STARTS: dict[AdapterId, tuple[int, ...]] = {PAIR: (7, 9), TRIPLE: (5, 5, 6), ALWAYS: ()}
TARGETS = ["q_proj", "v_proj", "down_proj", "lm_head"]


def peft_model(adapter: AdapterId) -> PeftModel:
    torch.manual_seed(len(STARTS[adapter]))
    start = list(STARTS[adapter])
    config = LoraConfig(r=3, target_modules=TARGETS, task_type="CAUSAL_LM", alora_invocation_tokens=start or None)
    model = get_peft_model(tiny("llama"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.4)
    return model.eval()


def compiled(model: PeftModel, adapter: AdapterId) -> Adapter:
    sites = {}
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
            sites[path] = Affine(delta=LowRank(a, b * module.scaling["default"]))
    return Adapter(id=adapter, method="LORA", sites=sites, start=STARTS[adapter])


def generated(model: PeftModel, job: Job) -> list[int]:
    with torch.no_grad():
        ids = model.generate(input_ids=torch.tensor([job.prompt]), max_new_tokens=job.num_new, do_sample=False)
    return ids[0, len(job.prompt) :].tolist()


def prompts(start: tuple[int, ...], make: random.Random) -> list[tuple[int, ...]]:
    """Prompts with the sequence absent, at the start, in the middle, repeated, overlapping, and at the very end."""

    def noise(count: int) -> tuple[int, ...]:
        return tuple(make.randrange(10, VOCAB) for _ in range(count))

    return [
        noise(9),
        (*start[:1], *noise(3), *start[-1:]) if start else noise(4),
        (*start, *noise(6)),
        (*noise(5), *start, *noise(7)),
        (*noise(4), *start, *noise(3), *start, *noise(4)),
        (*noise(2), *start[:1], *start, *noise(2)),
        (*noise(8), *start) or noise(1),
        start or noise(2),
    ]


@pytest.mark.parametrize("max_chunk", [2, 5, 40])
def test_tokens_are_those_of_peft(max_chunk: int) -> None:
    """In one mixed batch, with prompts in chunks that cut the sequence anywhere."""
    models = {adapter: peft_model(adapter) for adapter in STARTS}
    driver = Driver(ResidentBase(tiny("llama"), name="llama"), {a: compiled(m, a) for a, m in models.items()})
    assert driver.install(*models).failed_installs == ()
    make = random.Random(max_chunk)
    jobs = [Job(prompt=p, num_new=6, adapter=a) for a, start in STARTS.items() for p in prompts(start, make)]
    jobs += [Job(prompt=p, num_new=6) for p in prompts((7, 9), make)]
    driver.finish(jobs, max_chunk=max_chunk)
    plain = tiny("llama")
    for job in jobs:
        assert job.output == generated(models.get(job.adapter, plain), job), (job.adapter, job.prompt)
    absent = next(job for job in jobs if job.adapter == PAIR)
    assert absent.output == generated(plain, absent)


def test_the_adapter_changes_what_follows() -> None:
    model, plain = peft_model(PAIR), tiny("llama")
    jobs = [Job(prompt=p, num_new=6, adapter=PAIR) for p in prompts((7, 9), random.Random(0))[2:]]
    assert sum(generated(model, job) != generated(plain, job) for job in jobs) > 2
