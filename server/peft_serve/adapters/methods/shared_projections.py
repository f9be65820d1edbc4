"""VeRA and PVeRA: two random matrices that all sites share, and two vectors of each site's own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import Base, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema, Rule
from peft_serve.adapters.methods.fields import (
    LAYERS,
    RANK,
    SEED,
    TARGETS,
    contradiction,
    disagreement,
    tuned_biases,
)
from peft_serve.adapters.primitives import Affine
from peft_serve.adapters.registry import SharedLayout, Site, SiteLayout, Stored, Whole, compiles
from peft_serve.adapters.shared_primitives import Rescaled

MAX_DRAWN: Final = 1 << 26  # numbers that a seed may stand for: a quarter of a GiB
REQUIRED: Final[Mapping[str, Rule]] = MappingProxyType(
    {"r": RANK, "save_projection": rules.flag, "projection_prng_key": SEED}
)


@dataclass(frozen=True, slots=True)
class Projections:
    """What the sites share. `key` says what the values are: equal values have equal keys, whatever the adapter."""

    key: str
    a_RI: Tensor
    b_OR: Tensor

    @classmethod
    def of(cls, a_RI: Tensor, b_OR: Tensor) -> Projections:
        return cls(key_of(a_RI, b_OR), a_RI, b_OR)


def key_of(*matrices: Tensor) -> str:
    """A key of what many adapters share: equal values have equal keys."""
    digest = hashlib.sha256(" ".join(str(tuple(matrix.shape)) for matrix in matrices).encode())
    for matrix in matrices:
        digest.update(matrix.contiguous().numpy().reshape(-1).data)
    return f"sha256:{digest.hexdigest()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Projected:
    """What the two methods differ in: the beginning of their tensors' names, and the ranks of A for one of B."""

    prefix: str
    num_halves: int  # PVeRA's A has two halves, for the mean and for the variance of each rank

    def layout(self, spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG002 - one signature for every method
        num_ranks = self.num_halves * config.integer("r")
        names = (f"{self.prefix}_lambda_d", f"{self.prefix}_lambda_b")
        return SiteLayout(tensors={names[0]: ((num_ranks,),), names[1]: ((spec.out_features,),)})

    def shared(self, config: Config, base: Base, stored: Stored) -> SharedLayout:  # noqa: ARG002 - one signature for every method
        """The matrices, as long and as wide as they are stored: how large they must be depends on the sites."""
        if not config.flag("save_projection"):
            return SharedLayout()
        a, b, r = stored.get(f"{self.prefix}_A", ()), stored.get(f"{self.prefix}_B", ()), config.integer("r")
        if len(a) != 2 or len(b) != 2 or a[0] != self.num_halves * r or b[1] != r:
            reason = f"and its partner B are missing or have shapes {list(a)} and {list(b)}, which r = {r} denies"
            raise disagreement(f"base_model.{self.prefix}_A", f"{reason}; upload both files as peft saved them")
        return SharedLayout(tensors={f"{self.prefix}_A": a, f"{self.prefix}_B": b})

    def prepare(self, whole: Whole) -> Projections | None:
        """The matrices of the file, or drawn again from the seed: as large as the largest sides of all sites."""
        if not whole.targets:
            return None
        o = max(spec.out_features for spec in whole.targets)
        i = max(spec.in_features for spec in whole.targets)
        if not whole.config.flag("save_projection"):
            a_RI, b_OR = self._drawn(whole.config, o, i)
        else:
            a_RI, b_OR = whole.shared[f"{self.prefix}_A"], whole.shared[f"{self.prefix}_B"]
            if a_RI.shape[1] != i or b_OR.shape[0] != o:
                reason = f"and its partner B have {a_RI.shape[1]} columns and {b_OR.shape[0]} rows"
                reason += f"; the largest of the adapter's sites ask for {i} and {o}; serve it on its own base"
                raise disagreement(f"base_model.{self.prefix}_A", reason)
        return Projections.of(a_RI[: b_OR.shape[1]], b_OR)

    def _drawn(self, config: Config, o: int, i: int) -> tuple[Tensor, Tensor]:
        r = config.integer("r")
        if r * (self.num_halves * i + o) > MAX_DRAWN:
            raise contradiction("r", f"is {r}: too many numbers to draw for [{o}, {i}]; set save_projection")
        generator = torch.Generator().manual_seed(config.integer("projection_prng_key"))

        def draw(*shape: int) -> Tensor:
            return torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.float32), generator=generator)

        return draw(self.num_halves * r, i), draw(o, r)

    def compile(self, site: Site) -> Affine:
        shared: Projections = site.prepared
        inner_R = site.tensors[f"{self.prefix}_lambda_d"][: shared.b_OR.shape[1]]
        outer_O = site.tensors[f"{self.prefix}_lambda_b"]
        return Affine(maps=(Rescaled(shared.key, shared.a_RI, shared.b_OR, inner_R, outer_O),))


VERA: Final = ConfigSchema(
    required=REQUIRED,
    optional={**TARGETS, **LAYERS, "bias": tuned_biases("vera")},
    inert=frozenset({"vera_dropout", "d_initial", "fan_in_fan_out", "init_weights"}),
)
_VERA: Final = Projected(prefix="vera", num_halves=1)


@compiles("VERA", schema=VERA, layout=_VERA.layout, shared=_VERA.shared, prepare=_VERA.prepare)
def vera(site: Site) -> Affine:
    """l_b * B (l_d * A x), with random A and B cut to the site (arXiv:2310.11454, peft `VeraLayer`)."""
    return _VERA.compile(site)


PVERA: Final = ConfigSchema(
    required=REQUIRED,
    optional={**TARGETS, **LAYERS, "bias": tuned_biases("pvera")},
    inert=frozenset({"pvera_dropout", "d_initial", "fan_in_fan_out", "init_weights", "generator_seed"}),
    refused={
        "sample_at_inference": "makes every answer random; set it to false, and the mean that was learned is served"
    },
)
_PVERA: Final = Projected(prefix="pvera", num_halves=2)


@compiles("PVERA", schema=PVERA, layout=_PVERA.layout, shared=_PVERA.shared, prepare=_PVERA.prepare)
def pvera(site: Site) -> Affine:
    """VeRA by the mean of a learned distribution: the first half of A's ranks (arXiv:2512.07703, peft `PveraLayer`)."""
    return _PVERA.compile(site)
