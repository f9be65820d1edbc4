"""Methods whose matrix is a pattern of small blocks: Kronecker products and circulants."""

from __future__ import annotations

from typing import Final

from torch import Tensor

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.methods.fields import LAYERS, RANK, TARGETING, TARGETS, contradiction, tuned_biases
from peft_serve.adapters.primitives import Affine, Kronecker
from peft_serve.adapters.registry import Shape, Site, SiteLayout, Stored, compiles
from peft_serve.adapters.transform_primitives import Circulant

LINEAR: Final = frozenset({SiteKind.LINEAR})

# ---- LoKr

LOKR: Final = ConfigSchema(
    required={
        "r": RANK,
        "alpha": rules.number(1e6),
        "decompose_both": rules.flag,
        "decompose_factor": rules.integer(-1, 1 << 20),
    },
    optional={
        **TARGETING,
        "rank_pattern": rules.pattern(RANK),
        "alpha_pattern": rules.pattern(rules.number(1e6)),
    },
    inert=frozenset({"rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights", "use_effective_conv2d"}),
)


def _rank(config: Config, path: str) -> int:
    own = config.for_site("rank_pattern", path)
    return config.integer("r") if own is None else int(own)


def _lokr_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    r, factor = _rank(config, spec.path), config.integer("decompose_factor")
    (out_1, out_2), (in_1, in_2) = _factors(spec.out_features, factor), _factors(spec.in_features, factor)
    is_whole_1 = not (config.flag("decompose_both") and 2 * r < max(out_1, in_1))
    is_whole_2 = 2 * r >= max(out_2, in_2)
    return SiteLayout(
        num_values=out_1 * in_1 + out_2 * in_2,
        tensors={
            **_factor_shapes("lokr_w1", out_1, in_1, None if is_whole_1 else r),
            **_factor_shapes("lokr_w2", out_2, in_2, None if is_whole_2 else r),
        },
    )


def _factor_shapes(name: str, num_out: int, num_in: int, r: int | None) -> dict[str, tuple[Shape, ...]]:
    """One factor of the product, as a matrix or as a low-rank pair."""
    if r is None:
        return {name: ((num_out, num_in),)}
    return {f"{name}_a": ((num_out, r),), f"{name}_b": ((r, num_in),)}


def _factors(size: int, factor: int) -> tuple[int, int]:
    """A size as a product: `factor` times the rest if it divides, else the squarest with a first factor not beyond it.

    As LyCORIS splits: on to the next divisor while that makes the pair no longer in sum and is not beyond the factor.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    bound = size if factor == -1 else factor
    small, large = 1, size
    while small < large:
        following = next(n for n in range(small + 1, size + 1) if size % n == 0)
        if following > bound or following + size // following > small + large:
            break
        small, large = following, size // following
    return min(small, large), max(small, large)


@compiles("LOKR", schema=LOKR, layout=_lokr_layout, kinds=LINEAR)
def lokr(site: Site) -> Affine:
    """s (P kron Q), s = alpha / r whether or not P and Q are saved as low-rank pairs.

    LyCORIS (arXiv:2309.14859), peft `LoKrLayer`.
    """
    own = site.config.for_site("alpha_pattern", site.spec.path)
    alpha = site.config.number("alpha") if own is None else float(own)
    scale = alpha / _rank(site.config, site.spec.path)
    return Affine(maps=(Kronecker(scale * _factor(site, "lokr_w1"), _factor(site, "lokr_w2")),))


def _factor(site: Site, name: str) -> Tensor:
    if name in site.tensors:
        return site.tensors[name]
    return site.tensors[f"{name}_a"] @ site.tensors[f"{name}_b"]


# ---- C3A

C3A: Final = ConfigSchema(
    required={"block_size": RANK},
    optional={**TARGETS, **LAYERS, "block_size_pattern": rules.pattern(RANK), "bias": tuned_biases("c3a")},
    inert=frozenset({"init_weights"}),
)


def _c3a_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    own = config.for_site("block_size_pattern", spec.path)
    size = config.integer("block_size") if own is None else int(own)
    if spec.out_features % size or spec.in_features % size:
        reason = f"is {size}, which does not divide [{spec.out_features}, {spec.in_features}] of {spec.path}"
        raise contradiction("block_size", reason)
    return SiteLayout(tensors={"c3a_kernel": ((spec.out_features // size, spec.in_features // size, size),)})


@compiles("C3A", schema=C3A, layout=_c3a_layout, kinds=LINEAR)
def c3a(site: Site) -> Affine:
    """Circulant blocks, over the number of inputs (arXiv:2407.19342, peft `C3ALayer`).

    peft transforms the other way round, which is the same for real numbers.
    """
    return Affine(maps=(Circulant(site.tensors["c3a_kernel"] / site.spec.in_features),))
