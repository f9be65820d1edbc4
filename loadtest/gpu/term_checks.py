"""Every kind of term that an adapter may be made of, on the device, against the CPU.

Mixers and bottlenecks have kernels of their own, which are tried by themselves first.

One batch holds a row for each kind, its adapter made of that kind alone at most of the sites; what is compared are the
log-probabilities behind every token of its prompt.
"""

import random
from typing import Any, Final

import torch

from loadtest.gpu.ground import Ground
from loadtest.gpu.kernels import kernels_for
from loadtest.gpu.model_checks import CPU
from loadtest.gpu.results import Check, Found, bounded
from loadtest.gpu.tiny import base_on, has_triton, module, worst
from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.primitives import Adapter, Edit, Replace
from peft_serve.core import BASE, AdapterId
from peft_serve.engine.gpu_terms import others_error
from peft_serve.model.base import ResidentBase

KINDS: Final = ("llama", "gpt2")
KERNEL_BOUNDS: Final = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Of the largest number that comes out."""

BOUND: Final = 1e-3  # of a log-probability, in float32: some terms make large numbers
_SIZE: Final = 4  # blocks and grids of the terms divide sizes by it
_NEEDS_S: Final = 4.0


def terms(ground: Ground) -> Found:
    """One check for each kind of term and family."""
    checks = _kernels(ground) if has_triton() else []
    for number, kind in enumerate(KINDS[: 1 if ground.is_quick else None]):
        if number and ground.left_s < _NEEDS_S:
            return Found(checks=tuple(checks), left_out=(f"{kind}: no time was left",))
        checks += _family(ground, kind)
    return Found(checks=tuple(checks))


def _kernels(ground: Ground) -> list[Check]:
    tiny, memory = module("model.tiny_models").tiny, kernels_for(ground).low_rank.memory
    checks = []
    for dtype, bound in list(KERNEL_BOUNDS.items())[: 1 if ground.is_quick else None]:
        base = base_on(lambda: tiny("llama"), ground.device, kernels="off", dtype=dtype)
        name = f"mixers and bottlenecks, {str(dtype).removeprefix('torch.')}"
        checks.append(bounded(name, others_error(memory, base), bound))
    return checks


def _family(ground: Ground, kind: str) -> list[Check]:
    models = module("model.tiny_models")
    own = base_on(lambda: models.tiny(kind), CPU, kernels="off")
    ours = base_on(lambda: models.tiny(kind), ground.device)
    names = module("model.dense_algebra").LINEAR_TERMS
    adapters = [
        Adapter(id=AdapterId(f"sha256:{name}"), method="TEST", sites=_edits(own, name, seed))
        for seed, name in enumerate(names)
    ]
    exact, found = (_read(base, adapters, models.VOCAB) for base in (own, ours))
    checks = [
        bounded(f"{kind}: {name}", worst(found[i], exact[i]), BOUND)
        for i, name in enumerate((*names, "no adapter among them"))
    ]
    moved = sum(worst(exact[i], exact[-1]) > BOUND for i in range(len(names)))
    checks.append(Check(name=f"{kind}: the terms matter", passed=moved == len(names), note=f"{moved} of {len(names)}"))
    return checks


def _edits(base: ResidentBase, term: str, seed: int) -> dict[str, Edit]:
    """The term at most of the sites that take it."""
    algebra = module("model.dense_algebra")
    make = random.Random(seed)
    edits: dict[str, Edit] = {}
    for place, (path, spec) in enumerate(base.sites.items()):
        if make.random() < 0.3 or path.rpartition(".")[2] == "wpe":
            continue
        if spec.kind is SiteKind.NORM:
            dice = algebra.Dice(seed + place)
            edits[path] = Replace({name: dice.gain(shape[0]) for name, shape in spec.parameters.items()})
        elif spec.kind in (SiteKind.LINEAR, SiteKind.CONV1D) and _fits(term, spec):
            edits[path] = algebra.edit_of(term, spec, seed + place)
    return edits


def _fits(term: str, spec: SiteSpec) -> bool:
    if term == "rows" and spec.has_bias:
        return False
    return spec.in_features % _SIZE == 0 and spec.out_features % _SIZE == 0


def _read(base: ResidentBase, adapters: list[Adapter], vocab: int) -> list[Any]:
    """By adapter, and for the base behind them: log-probabilities behind every token of one prompt."""
    driving = module("model.driver")
    driver = driving.Driver(base, {adapter.id: adapter for adapter in adapters}, seed=1, num_blocks=400)
    ids = [adapter.id for adapter in adapters]
    done = driver.install(*ids)
    if done.failed_installs:
        raise RuntimeError(f"an adapter could not be installed: {done.failed_installs[0][1]}")
    (prompt,) = driving.random_jobs(random.Random(4), count=1, vocab=vocab)
    jobs = [driving.Job(prompt=prompt.prompt, num_new=1, adapter=adapter) for adapter in (*ids, BASE)]
    given: list[Any] = driver.read(jobs, chunk=5)
    by_slot = dict(zip((BASE, *ids), given, strict=True))  # read in the order of slots
    return [by_slot[adapter] for adapter in (*ids, BASE)]
