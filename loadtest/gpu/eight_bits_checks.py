"""Bases in 8 bits on the device: products against the decoded matrix in float64 on the CPU, and whole tiny models, with
adapters beside them, against the same on the CPU."""

import random
from functools import partial
from math import pow
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from loadtest.gpu.attention_checks import relative_error
from loadtest.gpu.ground import Ground
from loadtest.gpu.model_checks import CPU, LOGPROB_BOUND, ways
from loadtest.gpu.random_adapters import lora, on_host
from loadtest.gpu.results import Check, Found, bounded
from loadtest.gpu.tiny import base_on, has_triton, module, worst
from peft_serve.core import BASE
from peft_serve.engine.gpu_eight_bits import eight_bit_kernel
from peft_serve.kernels.eight_bits import Code, Coded, coded, decoded, multiplied
from peft_serve.model.base import ResidentBase
from peft_serve.model.eight_bits import store_in_eight_bits

BOUNDS: Final = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_FAMILIES: Final = ("llama", "t5", "bart")
_NEEDS_S: Final = 3.0


@torch.inference_mode()
def eight_bits(ground: Ground) -> Found:
    """Products in every type, then models in float32."""
    quick, checks = ground.is_quick, list[Check]()
    for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 1 if quick else None]:
        checks += _products(ground, dtype)
    for family in _FAMILIES[: 1 if quick else None]:
        for code in Code:
            if ground.left_s < _NEEDS_S:
                return Found(checks=tuple(checks), left_out=(f"{family}, {code} and what is behind: no time was left",))
            checks += _models(ground, family, code)
    return Found(checks=tuple(checks))


def _products(ground: Ground, dtype: torch.dtype) -> list[Check]:
    """By the kernel where there is one, and by torch, of few tokens and of many."""
    generator = torch.Generator().manual_seed(0)
    num_out, num_in = (40, 80) if ground.is_quick else (1024, 3584)
    weight, bias = (torch.randn(size, generator=generator) * 0.05 for size in ((num_out, num_in), (num_out,)))
    multiply = {"torch": multiplied}
    if has_triton():
        if not ground.is_gpu:
            module("kernels.triton.interpreter")  # lets Triton run here
        multiply["kernel"] = eight_bit_kernel(ground.device).multiply
    checks = []
    for code in Code:
        own = coded(weight, code)
        exact_IO = decoded(own, torch.float32).double().t()
        there = Coded(own.values_OI.to(ground.device), own.steps_O.to(ground.device), code)
        for num_tokens in (3,) if ground.is_quick else (1, 32, 300):
            x = (torch.randn(num_tokens, num_in, generator=generator) * pow(num_in, -0.25)).to(dtype)
            exact = x.double() @ exact_IO + bias.to(dtype).double()
            for name, act in multiply.items():
                error = relative_error(act(x.to(ground.device), there, bias.to(ground.device, dtype)), exact)
                what = f"{code}, {str(dtype).removeprefix('torch.')}, {num_tokens} tokens, {name}"
                checks.append(bounded(what, error, BOUNDS[dtype]))
    return checks


def _models(ground: Ground, family: str, code: Code) -> list[Check]:
    """Greedy tokens of rows with an adapter and of rows without, in one batch."""
    make = partial(_stored, family, code)
    first = base_on(make, CPU, kernels="off")
    adapter = on_host(lora(first, "eight-bits", 8, seed=1))
    expected, checks = _generated(first, adapter), []
    for way in ways():
        jobs = _generated(base_on(make, ground.device, kernels=way), adapter)
        same = [ours.output == own.output for ours, own in zip(jobs, expected, strict=True)]
        name = f"{family}, {code}, float32, {'kernels' if way == 'auto' else 'plain torch'}"
        note = f"{sum(same)} of {len(same)} answers"
        checks.append(Check(name=f"{name}: tokens of a mixed batch", passed=all(same), note=note))
        error = worst([job.logprobs for job in jobs], [job.logprobs for job in expected]) if all(same) else float("nan")
        checks.append(bounded(f"{name}: log-probabilities", error, LOGPROB_BOUND))
    return checks


def _stored(family: str, code: Code) -> PreTrainedModel:
    model: PreTrainedModel = module("model.tiny_models").tiny(family)
    store_in_eight_bits(model, code, CPU)
    return model


def _generated(base: ResidentBase, adapter: Any) -> list[Any]:
    driver, vocab = module("model.driver"), module("model.tiny_models").VOCAB
    jobs: list[Any] = driver.random_jobs(
        random.Random(2),
        count=6,
        vocab=vocab,
        adapter=lambda i: adapter.id if i % 2 else BASE,
        start=base.decoder_start_ids,
        has_source=base.shape.is_encoder_decoder,
    )
    running = driver.Driver(base, {adapter.id: adapter}, seed=1)
    running.install(adapter.id)
    running.finish(jobs)
    return jobs
