"""Whole tiny models of each family on the device against the same models on the CPU.

In float32 every greedy token must be the same, in batches of mixed lengths and alone. In bfloat16 rounding differs, so
there the log-probabilities of prompts are held against float32, no further from it than plain torch on this device.
"""

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from loadtest.gpu.ground import Ground
from loadtest.gpu.results import Check, Found, bounded
from loadtest.gpu.tiny import base_on, has_triton, module, worst
from peft_serve.core import Reading
from peft_serve.engine.gpu_kernels import Mode
from peft_serve.model.base import ResidentBase

CPU: Final = torch.device("cpu")
FAMILIES: Final = (
    "llama",
    "qwen2",
    "gpt2",
    "opt",
    "gemma2",
    "t5",
    "bart",
    "mistral",
    "qwen3",
    "gpt_neox",
    "mt5",
    "gemma",
)
ENCODERS: Final = ("bert", "roberta", "distilbert", "electra", "deberta-v2")
FEW: Final = 2  # of a quick run
LOGPROB_BOUND: Final = 2e-4  # of a token, as the tests allow it between this program and the library
STATE_BOUND: Final = 2e-4
PLAIN_BOUND: Final = 0.6  # of a log-probability in bfloat16, the root of the mean square: rows gone wrong are at 1
WORSE_THAN_PLAIN: Final = 1.5  # times plain torch's own error in bfloat16, beside the least of errors
LEAST_ERROR: Final = 0.02
_LABELS: Final = {"off": "plain torch", "auto": "kernels"}
_NEEDS_S: Final = 6.0


def ways() -> tuple[Mode, ...]:
    """Without kernels of our own, and with them where they can be had."""
    return ("off", "auto") if has_triton() else ("off",)


def models(ground: Ground) -> Found:
    """Generation in float32, without kernels of our own and with them."""
    checks: list[Check] = []
    for family in FAMILIES[: FEW if ground.is_quick else None]:
        if ground.left_s < _NEEDS_S:
            return Found(checks=tuple(checks), left_out=(f"{family} and those behind it: no time was left",))
        checks += _family(ground, family)
    return Found(checks=tuple(checks))


def _family(ground: Ground, family: str) -> list[Check]:
    make = partial(module("model.tiny_models").tiny, family)
    expected = _generated(base_on(make, CPU, kernels="off"))
    checks = []
    for way in ways():
        base = base_on(make, ground.device, kernels=way)
        jobs = _generated(base)
        name = f"{family}, float32, {_LABELS[way]}"
        same = [ours.output == own.output for ours, own in zip(jobs, expected, strict=True)]
        checks.append(
            Check(name=f"{name}: tokens of a batch", passed=all(same), note=f"{sum(same)} of {len(same)} answers")
        )
        error = worst([job.logprobs for job in jobs], [job.logprobs for job in expected]) if all(same) else float("nan")
        checks.append(bounded(f"{name}: log-probabilities", error, LOGPROB_BOUND))
        alone = _alone(base, jobs[: FEW if ground.is_quick else 4])
        checks.append(Check(name=f"{name}: alone as in the batch", passed=alone))
    return checks


def _generated(base: ResidentBase) -> list[Any]:
    """Jobs of random prompts, run to their end side by side, in random chunks; the same ones for every base."""
    driver, jobs = module("model.driver"), _jobs(base)
    driver.Driver(base, seed=1).finish(jobs)
    return jobs


def _jobs(base: ResidentBase) -> list[Any]:
    vocab = module("model.tiny_models").VOCAB
    jobs: list[Any] = module("model.driver").random_jobs(
        random.Random(2),
        count=7,
        vocab=vocab,
        start=base.decoder_start_ids,
        has_source=base.shape.is_encoder_decoder,
    )
    return jobs


def _alone(base: ResidentBase, jobs: Sequence[Any]) -> bool:
    driver = module("model.driver")
    same = []
    for job in jobs:
        single = driver.Job(prompt=job.prompt, source=job.source, num_new=job.num_new)
        driver.Driver(base, seed=3).finish([single])
        same.append(single.output == job.output)
    return all(same)


def bfloat16(ground: Ground) -> Found:
    """Prompts in bfloat16 against float32 with the same weights, and against plain torch's own distance from it."""
    checks: list[Check] = []
    tiny = module("model.tiny_models").tiny
    for family in FAMILIES[: FEW if ground.is_quick else None]:
        if ground.left_s < _NEEDS_S:
            return Found(checks=tuple(checks), left_out=(f"{family} and those behind it: no time was left",))
        exact = _read(base_on(partial(_rounded, family), CPU, kernels="off"))
        plain, *ours = (
            _distance(_read(base_on(partial(tiny, family), ground.device, kernels=way, dtype=torch.bfloat16)), exact)
            for way in ways()
        )
        name = f"{family}, bfloat16: log-probabilities of prompts"
        checks.append(bounded(f"{name}, plain torch", plain, PLAIN_BOUND))
        allowed = max(LEAST_ERROR, WORSE_THAN_PLAIN * plain)
        checks += [bounded(f"{name}, kernels", error, allowed, f"plain torch here: {plain:.2g}") for error in ours]
    return Found(checks=tuple(checks))


def _rounded(family: str) -> PreTrainedModel:
    """The model with the weights that it has in bfloat16."""
    model: PreTrainedModel = module("model.tiny_models").tiny(family)
    return model.bfloat16().float()


def _read(base: ResidentBase) -> list[Any]:
    """Log-probabilities of all ids behind every token of every prompt. The first chunk reads only what is in the step,
    the others read blocks too."""
    given: list[Any] = module("model.driver").Driver(base, seed=1).read(_jobs(base), chunk=9)
    return given


def _distance(found: Sequence[Any], exact: Sequence[Any]) -> float:
    """The root of the mean square of the differences."""
    ours, own = (torch.tensor([row for job in each for row in job], dtype=torch.float64) for each in (found, exact))
    return float((ours - own).square().mean().sqrt())


def encoders(ground: Ground) -> Found:
    """Readings of encoders in float32."""
    checks: list[Check] = []
    tiny, driver = module("model.tiny_encoders"), module("model.reading_driver")
    make = random.Random(5)
    prompts = [driver.random_prompt(make, tiny.VOCAB) for _ in range(6)]
    wishes = [driver.Wish(reading=reading, prompt=p) for p in prompts for reading in (Reading.FIRST, Reading.MEAN)]
    for family in ENCODERS[: 1 if ground.is_quick else None]:
        if ground.left_s < _NEEDS_S:
            return Found(checks=tuple(checks), left_out=(f"{family} and those behind it: no time was left",))
        expected = _states(
            driver.ReadingDriver(base_on(partial(tiny.tiny_encoder, family), CPU, kernels="off")), wishes
        )
        for way in ways():
            base = base_on(partial(tiny.tiny_encoder, family), ground.device, kernels=way)
            error = worst(_states(driver.ReadingDriver(base), wishes), expected)
            checks.append(bounded(f"{family}, float32, {_LABELS[way]}: states", error, STATE_BOUND))
    return Found(checks=tuple(checks))


def _states(reader: Any, wishes: Sequence[Any]) -> list[tuple[float, ...]]:
    return [row for rows in reader.read(wishes) for row in rows]
