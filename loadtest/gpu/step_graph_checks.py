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
from peft_serve.adapters.base import SiteKind
from peft_serve.adapters.primitives import Adapter, Affine, BlockDiagonal, Edit, GatedPrompt, LowRank
from peft_serve.adapters.sublayer_primitives import Bottleneck, Reads
from peft_serve.core import BASE, AdapterId
from peft_serve.engine.gpu_graphs import capturing_by
from peft_serve.engine.gpu_terms import other_kernels
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
    base.adapted.run_others_by(other_kernels(kernels.low_rank.memory))
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
    checks.append(_none_new(outcomes, num_before))
    driver.exchange(2, names[4])
    checks += _phase(few, "terms of other kinds", driver, plain, adapters, (BASE, names[4], names[3]))
    num_before = outcomes["captured"]
    driver.exchange(2, names[5])
    checks += _phase(few, "others of these kinds in the slot", driver, plain, adapters, (BASE, names[5], names[3]))
    checks.append(_none_new(outcomes, num_before))
    eager = outcomes["eager"]
    said = f"{dict(outcomes)}"
    checks.append(Check(name="decode steps are replayed", passed=outcomes["replayed"] > 0 and not eager, note=said))
    return Found(checks=tuple(checks))


def _none_new(outcomes: Counter[str], num_before: int) -> Check:
    new = outcomes["captured"] - num_before
    return Check(name="no graph is captured for it", passed=not new, note=f"{new} were")


def _recorder(ground: Ground) -> Recorder:
    if ground.is_gpu:
        return CudaRecorder(ground.device)
    tape: Recorder = module("model.tape").TapeRecorder()
    return tape


def _adapters(base: ResidentBase, *, attention_only: bool) -> dict[AdapterId, Adapter]:
    """Two of one recipe, one with vectors, a third of the first recipe, which comes later, and two of other kinds."""
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
    others = (_other(base, name, width) for name, width in (("e", 3), ("f", 9)))
    return {each.id: each for each in (first, second, scaled, third, *others)}


def _other(base: ResidentBase, name: str, width: int) -> Adapter:
    """In the last layer and at the embedding: a bottleneck, block-diagonal maps, a gated prompt and low-rank terms."""
    make, sites = torch.Generator().manual_seed(width), dict[str, Edit]()

    def drawn(*size: int) -> torch.Tensor:
        return 0.3 * torch.randn(size, generator=make)

    for path, spec in base.sites.items():
        num_in, num_out = spec.in_features, spec.out_features
        if spec.kind is SiteKind.EMBEDDING:
            sites[path] = Affine(delta=LowRank(drawn(width, num_in), drawn(num_out, width)))
        elif path.endswith("layers.1.self_attn"):
            prompts = (drawn(2, width, base.shape.head_dim) for _ in range(2))
            sites[path] = GatedPrompt(*prompts, torch.tensor([0.7]), is_projected=True)
        elif path.endswith("layers.1.self_attn.q_proj"):
            sites[path] = Affine(in_mix=BlockDiagonal(torch.eye(8) + drawn(num_in // 8, 8, 8)))
        elif path.endswith("layers.1.output_adapters"):
            sites[path] = Bottleneck(
                down_BD=drawn(width, num_in),
                down_bias_B=drawn(width),
                up_DB=drawn(num_out, width),
                up_bias_D=drawn(num_out),
                activation="gelu",
                scale=torch.ones(1),
                reads=Reads.RESIDUAL,
            )
    return Adapter(id=AdapterId(f"sha256:{name}"), method="TEST", sites=sites)


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
