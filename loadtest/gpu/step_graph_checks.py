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
from peft_serve.adapters.primitives import Adapter, Affine, BlockDiagonal, Edit, GatedPrompt, LowRank, Rows
from peft_serve.adapters.sublayer_primitives import Bottleneck, Coupling, Reads, TwoLayers
from peft_serve.core import BASE, AdapterId
from peft_serve.engine.gpu_graphs import capturing_by
from peft_serve.engine.gpu_terms import other_kernels
from peft_serve.model.base import ResidentBase
from peft_serve.model.cuda_graphs import CudaRecorder
from peft_serve.model.step_graphs import Recorder
from peft_serve.model.triton_attention import PlanAttention

_CPU: Final = torch.device("cpu")
_LOGPROB_BOUND: Final = 2e-4  # as of whole models
_PARTS_BOUND: Final = 1e-3  # as of terms: some make large numbers
_PERSONAL: Final = {
    "q_proj": "dense",
    "k_proj": "kronecker",
    "v_proj": "sparse",
    "o_proj": "circulant",
    "gate_proj": "spectrum",
    "up_proj": "bases",
    "down_proj": "replace",
    "lm_head": "rows",
}
"""By module, the term that is computed for its adapter alone there."""
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
    driver = module("model.driver").Driver(base, adapters, capturing=replace(capturing, seen=1, rest=0))
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
    for which, name in zip(("an adapter", "another one"), names[6:], strict=True):
        driver.exchange(3, name)
        used, told = (BASE, name, names[3]), f"{which} with parts of its own"
        checks += _phase(few, told, driver, plain, adapters, used, bound=_PARTS_BOUND)
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
    """Two of one recipe, one with vectors, a third of the first recipe, which comes later, two of other kinds, and two
    with parts that are computed for them alone."""
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
    own = (_personal(base, name, seed) for name, seed in (("g", 1), ("h", 2)))
    return {each.id: each for each in (first, second, scaled, third, *others, *own)}


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


def _personal(base: ResidentBase, name: str, seed: int) -> Adapter:
    """Each kind of part that is computed for an adapter by itself: in the last layer, around it, and in front."""
    algebra, make, sites = module("model.dense_algebra"), torch.Generator().manual_seed(seed), dict[str, Edit]()

    def drawn(*size: int) -> torch.Tensor:
        return 0.2 * torch.randn(size, generator=make)

    def two_layers(half: int) -> TwoLayers:
        return TwoLayers(drawn(3, half), drawn(3), drawn(half, 3), drawn(half))

    for path, spec in base.sites.items():
        module_name = path.rpartition(".")[2]
        if "layers.0." in path:
            continue
        if spec.kind is SiteKind.EMBEDDING:
            sites[path] = Affine(rows=Rows(torch.arange(6, 40), drawn(34, spec.out_features)))
        elif module_name in _PERSONAL:
            sites[path] = algebra.edit_of(_PERSONAL[module_name], spec, seed)
        elif module_name == "invertible_adapters":
            half = spec.out_features // 2
            sites[path] = Coupling(two_layers(half), two_layers(half), "tanh")
    return Adapter(id=AdapterId(f"sha256:{name}"), method="TEST", sites=sites)


def _phase(
    few: bool,
    name: str,
    driver: Any,
    plain: ResidentBase,
    adapters: dict[AdapterId, Adapter],
    used: tuple[Any, ...],
    *,
    bound: float = _LOGPROB_BOUND,
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
        bounded(f"{name}: log-probabilities", error, bound),
    ]


def _jobs(few: bool, used: tuple[Any, ...]) -> list[Any]:
    job = module("model.driver").Job
    count = 2 if few else 12
    return [
        job(prompt=(7 + i,) if few else (7 + i, 30), num_new=count, adapter=name)
        for i, name in enumerate(sorted(used, key=str))
    ]
