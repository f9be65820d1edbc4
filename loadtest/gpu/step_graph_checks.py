"""Whole decode steps in CUDA graphs: tokens of steps that are replayed for adapters that were not there when they were
captured, against the same model on the CPU. On a CPU a tape takes the graphs' place, and the tests' attention that of
the kernel, which takes too long there.
"""

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch

from loadtest.gpu.ground import Ground
from loadtest.gpu.kernels import kernels_for
from loadtest.gpu.random_adapters import lora
from loadtest.gpu.results import Check, Found, bounded
from loadtest.gpu.tiny import base_on, module, worst
from peft_serve.adapters.primitives import Adapter, Affine, Edit
from peft_serve.core import BASE, AdapterId
from peft_serve.engine.gpu_graphs import capturing_by
from peft_serve.model.base import ResidentBase
from peft_serve.model.cuda_graphs import CudaRecorder
from peft_serve.model.step_graphs import Recorder
from peft_serve.model.triton_attention import PlanAttention

_CPU: Final = torch.device("cpu")
_LOGPROB_BOUND: Final = 2e-4  # as of whole models
_MAX_ROWS: Final = 8
_MAX_RANK: Final = 32


def step_graphs(ground: Ground) -> Found:
    """Greedy tokens in float32: the base, mixes, and other adapters in the slots of those that were captured."""
    make = partial(module("model.tiny_models").tiny, "llama")
    plain, base = base_on(make, _CPU, kernels="off"), base_on(make, ground.device, kernels="off")
    kernels = kernels_for(ground)
    slow = None if ground.is_gpu else module("model.slow_tiles").SlowTiles(kernels.attention.sizes)
    base.runs.attention.whole = PlanAttention(slow or kernels.attention)
    base.adapted.run_low_rank_by(kernels.low_rank)
    outcomes: Counter[str] = Counter()
    capturing = capturing_by(
        _recorder(ground),
        base,
        kernels,
        max_rows=_MAX_ROWS,
        max_rank=_MAX_RANK,
        told=lambda outcome: outcomes.update([outcome]),
    )
    adapters = _adapters(plain, attention_only=ground.is_quick)
    driver = module("model.driver").Driver(base, adapters, capturing=replace(capturing, seen=1))
    names = list(adapters)
    driver.install(*names[:3])
    few = ground.is_quick
    checks = _phase(few, "the base and two adapters", driver, plain, adapters, (BASE, names[0], names[1]))
    checks += [] if few else _phase(few, "all three recipes", driver, plain, adapters, (BASE, *names[:3]))
    num_before = outcomes["captured"]
    driver.exchange(1, names[3])
    checks += _phase(few, "another adapter in a slot", driver, plain, adapters, (BASE, names[3], names[1]))
    new, eager = outcomes["captured"] - num_before, outcomes["eager"]
    checks.append(Check(name="no graph is captured for it", passed=not new, note=f"{new} were"))
    said = f"{dict(outcomes)}"
    checks.append(Check(name="decode steps are replayed", passed=outcomes["replayed"] > 0 and not eager, note=said))
    return Found(checks=tuple(checks))


def _recorder(ground: Ground) -> Recorder:
    if ground.is_gpu:
        return CudaRecorder(ground.device)
    tape: Recorder = module("model.tape").TapeRecorder()
    return tape


def _adapters(base: ResidentBase, *, attention_only: bool) -> dict[AdapterId, Adapter]:
    """Two of one recipe, one with vectors, and a third of the first recipe, which comes later."""
    first, second, third, like = (
        lora(base, name, rank, seed=rank, attention_only=attention_only)
        for name, rank in (("a", 4), ("b", 20), ("d", 7), ("c", 3))
    )
    make = torch.Generator().manual_seed(1)
    sites: dict[str, Edit] = {}
    for path, edit in like.sites.items():
        spec = base.sites[path]
        assert isinstance(edit, Affine)
        scale = 1 + 0.2 * torch.randn(spec.out_features, generator=make)
        sites[path] = replace(edit, out_scale=scale, shift=0.1 * torch.randn(spec.out_features, generator=make))
    scaled = Adapter(id=AdapterId("sha256:c"), method="TEST", sites=sites)
    return {each.id: each for each in (first, second, scaled, third)}


def _phase(
    few: bool, name: str, driver: Any, plain: ResidentBase, adapters: dict[AdapterId, Adapter], used: tuple[Any, ...]
) -> list[Check]:
    """Side by side, a token at a time: what is replayed, and the same without adapters' neighbours on the CPU."""
    jobs, expected = _jobs(few, used), _jobs(few, used)
    driver.finish(jobs, max_chunk=1, share=1.0)
    driver.give_back(jobs)
    other = module("model.driver").Driver(plain, adapters)
    own = sorted(set(used) - {BASE})
    other.install(*own)
    other.finish(expected)
    other.run(removes=tuple(range(1, 1 + len(own))))
    same = [ours.output == theirs.output for ours, theirs in zip(jobs, expected, strict=True)]
    told = f"{sum(same)} of {len(same)} answers"
    error = worst([j.logprobs for j in jobs], [j.logprobs for j in expected]) if all(same) else float("nan")
    return [
        Check(name=f"{name}: tokens of replayed steps", passed=all(same), note=told),
        bounded(f"{name}: log-probabilities", error, _LOGPROB_BOUND),
    ]


def _jobs(few: bool, used: tuple[Any, ...]) -> list[Any]:
    job = module("model.driver").Job
    count = 2 if few else 12
    return [
        job(prompt=(7 + i,) if few else (7 + i, 30), num_new=count, adapter=name)
        for i, name in enumerate(sorted(used, key=str))
    ]
