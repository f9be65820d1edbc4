"""Methods that weigh random matrices which all sites share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import Base, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.methods.fields import (
    LAYERS,
    RANK,
    SEED,
    TARGETS,
    contradiction,
    disagreement,
    tuned_biases,
)
from peft_serve.adapters.methods.shared_projections import key_of
from peft_serve.adapters.primitives import Affine
from peft_serve.adapters.registry import SharedLayout, Site, SiteLayout, Stored, Whole, compiles
from peft_serve.adapters.shared_primitives import SharedBases

MAX_DRAWN: Final = 1 << 28  # numbers that a seed may stand for: a GiB, which 70 billion parameters do not ask for
A: Final = "randlora_A"
B: Final = "randlora_B"

RANDLORA: Final = ConfigSchema(
    required={
        "r": RANK,
        "randlora_alpha": rules.number(1e6),
        "save_projection": rules.flag,
        "projection_prng_key": SEED,
        "sparse": rules.flag,
        "very_sparse": rules.flag,
    },
    optional={**TARGETS, **LAYERS, "bias": tuned_biases("randlora")},
    inert=frozenset({"randlora_dropout", "fan_in_fan_out", "init_weights"}),
)


def _num_bases(smaller: int, r: int) -> int:
    """So many that they reach full rank."""
    return -(-smaller // r)


def _shared(config: Config, base: Base, stored: Stored) -> SharedLayout:  # noqa: ARG001 - one signature for every method
    if not config.flag("save_projection"):
        return SharedLayout()
    r, a, b = config.integer("r"), stored.get(A, ()), stored.get(B, ())
    if len(a) != 3 or len(b) != 3 or a[:2] != (r, 1) or b[1:] != (_num_bases(a[2], r), r):
        reason = f"the bases of {r} ranks are missing or have shapes {list(a)} and {list(b)}, which do not go together"
        raise disagreement(f"base_model.{A}", reason)
    return SharedLayout(tensors={A: a, B: b})


def _layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    r, smaller = config.integer("r"), min(spec.out_features, spec.in_features)
    if r > smaller:
        raise contradiction("r", f"is {r}; {spec.path} has [{spec.out_features}, {spec.in_features}] and fewer ranks")
    num_bases = _num_bases(smaller, r)
    return SiteLayout(
        tensors={"randlora_lambda": ((r, num_bases),), "randlora_gamma": ((num_bases, smaller),)},
        leftovers=(A, B),  # peft repeats the shared bases at every site
    )


@dataclass(frozen=True, slots=True)
class Bases:
    """What the sites share: A [r, s] and B [l, r n], whose columns count by basis and then rank."""

    key: str
    a_RS: Tensor
    b_LC: Tensor


def _bases(whole: Whole) -> Bases | None:
    """The bases, cut to what the sites read: the smaller side of none may be as large as that of all together."""
    if not whole.targets:
        return None
    r = whole.config.integer("r")
    smaller = max(min(spec.out_features, spec.in_features) for spec in whole.targets)
    a, b = _uncut(whole)
    a_RS = a[:, 0, :smaller].contiguous()
    b_LC = b[:, : _num_bases(smaller, r)].flatten(start_dim=1).contiguous()
    return Bases(key_of(a_RS, b_LC), a_RS, b_LC)


def _uncut(whole: Whole) -> tuple[Tensor, Tensor]:
    """A [r, 1, smaller] and B [larger, bases, r], of the file or drawn again: for the largest sides of all sites."""
    sides = (max(spec.out_features for spec in whole.targets), max(spec.in_features for spec in whole.targets))
    smaller, larger = min(sides), max(sides)
    if whole.config.flag("save_projection"):
        if whole.shared[A].shape[2] != smaller or whole.shared[B].shape[0] != larger:
            raise disagreement(f"base_model.{A}", f"is not for sites whose largest sides are {smaller} and {larger}")
        return whole.shared[A], whole.shared[B]
    r = whole.config.integer("r")
    if larger * (smaller + r) > MAX_DRAWN:
        raise contradiction(
            "save_projection", f"is false: too many numbers to draw for [{larger}, {smaller}]; save them"
        )
    generator = torch.Generator().manual_seed(whole.config.integer("projection_prng_key"))
    if whole.config.flag("very_sparse"):
        return _sparse_bases(r, smaller, larger, math.sqrt(smaller), generator)
    if whole.config.flag("sparse"):
        return _sparse_bases(r, smaller, larger, 3, generator)
    return _uniform_bases(r, smaller, larger, generator)


def _uniform_bases(r: int, smaller: int, larger: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Uniform numbers, drawn and scaled in bfloat16: peft's choice wherever that exists, which is nearly everywhere."""

    def draw(*shape: int) -> Tensor:
        empty = torch.empty(shape, dtype=torch.bfloat16)
        return torch.nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)

    a = draw(r, 1, smaller)
    b = torch.cat([draw(larger, 1, r) for _ in range(_num_bases(smaller, r))], dim=1)
    return (a / a.std()).float(), (b / b.std()).float()


def _sparse_bases(
    r: int, smaller: int, larger: int, sparsity: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """-1 and 1 with probability 1 / (2 sparsity) each, else 0."""
    edge = 1 / (2 * sparsity)
    drawn = (
        torch.rand((r, 1, smaller), generator=generator),
        torch.rand((larger, _num_bases(smaller, r), r), generator=generator),
    )
    a, b = ((values > 1 - edge).float() - (values < edge).float() for values in drawn)
    return a / a.std(), b / b.std()


@compiles("RANDLORA", schema=RANDLORA, layout=_layout, shared=_shared, prepare=_bases)
def randlora(site: Site) -> Affine:
    """A sum of random low-rank maps, each weighed by diagonals, that together have full rank.

    arXiv:2502.00987, peft `RandLoraLayer`: s B (lambda A gamma) with s = alpha / r where the site has more outputs
    than inputs, its transpose where it has fewer. The random A and B are cut to the site. peft counts the columns
    of B by basis and then rank and the rows of A by rank and then basis, and so do we.

    The sum is not multiplied out: that would be faster for one adapter on its own, but take a matrix at every site,
    where weights and gains take a matrix over the rank and all adapters of a seed share the bases.
    """
    bases: Bases = site.prepared
    scale = site.config.number("randlora_alpha") / site.config.integer("r")
    weights_RQ, gains_QS = scale * site.tensors["randlora_lambda"], site.tensors["randlora_gamma"]
    is_transposed = site.spec.out_features < site.spec.in_features
    return Affine(maps=(SharedBases(bases.key, bases.a_RS, bases.b_LC, weights_RQ, gains_QS, is_transposed),))
