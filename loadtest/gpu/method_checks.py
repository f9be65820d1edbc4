"""Adapters of every method in one batch on the device, against the same batch on the CPU.

peft makes the checkpoints, with random numbers; they are compiled once. That what the CPU gives is what peft gives is
for the tests to say, on every change; here it is the truth.
"""

import random
from typing import Any, Final

from loadtest.gpu.ground import Ground
from loadtest.gpu.model_checks import CPU, LOGPROB_BOUND
from loadtest.gpu.results import Check, Found, bounded
from loadtest.gpu.tiny import base_on, module, worst
from peft_serve.adapters.compiler import compile_adapter
from peft_serve.adapters.gate import inspect
from peft_serve.adapters.limits import GateLimits
from peft_serve.adapters.primitives import Adapter
from peft_serve.core import BASE, AdapterId
from peft_serve.model.base import ResidentBase

KINDS: Final = ("llama", "gpt2", "t5")
_QUICK: Final = ("lora", "ia3", "prefix_tuning")
_AT_ONCE: Final = 24  # adapters in slots
_SHARE: Final = 0.6  # of the part's time: what is not made by then is not checked, and said


def methods(ground: Ground) -> Found:
    """Every method on a decoder with grouped heads, one with biases, and an encoder-decoder."""
    checks: list[Check] = []
    left_out: list[str] = []
    for number, kind in enumerate(KINDS[: 1 if ground.is_quick else None]):
        until_s = ground.clock() + ground.left_s / (len(KINDS) - number)
        checks += _kind(ground, kind, until_s, left_out)
    return Found(checks=tuple(checks), left_out=tuple(left_out))


def _kind(ground: Ground, kind: str, until_s: float, left_out: list[str]) -> list[Check]:
    making = module("adapters.checkpoints")
    lively = module("parity.bases").lively_base
    own = base_on(lambda: lively(kind), CPU, kernels="off")
    all_names = [name for name in making.methods_for(kind) if not ground.is_quick or name in _QUICK]
    stop_s = ground.clock() + _SHARE * (until_s - ground.clock())
    adapters: dict[str, Adapter] = {}
    for number, name in enumerate(all_names):
        if ground.clock() > stop_s:
            break
        files, _ = making.make_checkpoint(name, kind, seed=100 + number, base=lively(kind))
        adapters[name] = compile_adapter(inspect(files, own, GateLimits()), own, GateLimits())
    ours = base_on(lambda: lively(kind), ground.device)
    checks = []
    for first in range(0, len(adapters), _AT_ONCE):
        part = dict(list(adapters.items())[first : first + _AT_ONCE])
        checks += _batch(kind, part, ours, own, vocab=making.VOCAB)
    left = len(all_names) - len(adapters)
    if left:
        left_out.append(f"{kind}: {all_names[len(adapters)]} and {left - 1} more: no time was left")
    return checks


def _batch(
    kind: str, adapters: dict[str, Adapter], ours: ResidentBase, own: ResidentBase, *, vocab: int
) -> list[Check]:
    """One check for each method, and one for the log-probabilities of the whole batch."""
    expected, found = (_run(base, list(adapters.values()), vocab) for base in (own, ours))
    checks = []
    for name, adapter in (*adapters.items(), ("no adapter", None)):
        wanted = BASE if adapter is None else adapter.id
        pairs = [(a.output, b.output) for a, b in zip(found, expected, strict=True) if a.adapter == wanted]
        same = sum(a == b for a, b in pairs)
        note = f"{same} of {len(pairs)} answers"
        checks.append(Check(name=f"{kind}, {name}: tokens", passed=same == len(pairs) > 0, note=note))
    is_same = all(check.passed for check in checks)
    error = worst([job.logprobs for job in found], [job.logprobs for job in expected]) if is_same else float("nan")
    checks.append(bounded(f"{kind}, {len(adapters)} methods in a batch: log-probabilities", error, 5 * LOGPROB_BOUND))
    base_output = {job.prompt + job.source: job.output for job in expected if job.adapter == BASE}
    moved = {
        job.adapter for job in expected if job.adapter != BASE and job.output != base_output[job.prompt + job.source]
    }
    is_heard = len(moved) * 2 >= len(adapters)
    checks.append(Check(name=f"{kind}: the adapters matter", passed=is_heard, note=f"{len(moved)} of {len(adapters)}"))
    return checks


def _run(base: ResidentBase, adapters: list[Adapter], vocab: int) -> list[Any]:
    """The same two prompts by every adapter and by the base, in random chunks, side by side."""
    driving = module("model.driver")
    driver = driving.Driver(base, {adapter.id: adapter for adapter in adapters}, seed=1, num_blocks=1500)
    ids: list[AdapterId] = [adapter.id for adapter in adapters]
    done = driver.install(*ids)
    if done.failed_installs:
        raise RuntimeError(f"an adapter could not be installed: {done.failed_installs[0][1]}")
    prompts = driving.random_jobs(
        random.Random(3), count=2, vocab=vocab, start=base.decoder_start_ids, has_source=base.shape.is_encoder_decoder
    )
    jobs = [
        driving.Job(prompt=one.prompt, source=one.source, num_new=8, adapter=adapter)
        for adapter in (*ids, BASE)
        for one in prompts
    ]
    driver.finish(jobs)
    driver.run(removes=tuple(range(1, len(ids) + 1)))
    return jobs
