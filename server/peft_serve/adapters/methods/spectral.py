"""Methods that learn a few coefficients of a matrix's spectrum, at places drawn from a seed.

The places are the beginning of a permutation of all o * i entries. It depends on seed and shape alone, so sites of
one shape have the same places, and each shape is permuted once for an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.methods.fields import COUNT, SEED, TARGETING, contradiction, disagreement, tuned_biases
from peft_serve.adapters.methods.wavelets import LOW_PASS, synthesis
from peft_serve.adapters.primitives import Affine, Dense, Sparse
from peft_serve.adapters.registry import Shape, Site, SiteLayout, Stored, Whole, compiles
from peft_serve.adapters.transform_primitives import Spectrum
from peft_serve.adapters.verdict import quoted

Places = Mapping[Shape, Tensor]
"""Flat places by the shape [o, i] of a site, as many as the site with most of them needs."""

MAX_PERMUTED: Final = 1 << 28  # places: two GiB while they are drawn; projections of 70 billion parameters have fewer
ENTRY_COST: Final = 16  # about how many entries of a matrix one that is looked up by its place is worth
SHARED_FIELDS: Final = {
    "n_frequency": COUNT,
    "scaling": rules.number(1e6),
    "random_loc_seed": SEED,
}
FOURIERFT: Final = ConfigSchema(
    required=SHARED_FIELDS,
    optional={**TARGETING, "n_frequency_pattern": rules.pattern(COUNT), "bias": tuned_biases("fourier")},
    inert=frozenset({"fan_in_fan_out", "init_weights"}),
)


WAVEFT: Final = ConfigSchema(
    required={**SHARED_FIELDS, "wavelet_family": rules.text, "use_idwt": rules.flag},
    optional={
        **TARGETING,
        "n_frequency_pattern": rules.pattern(COUNT),
        "proportional_parameters": rules.flag,
        "bias": tuned_biases("waveft"),
    },
    inert=frozenset({"fan_in_fan_out", "init_weights"}),
)


def _shape(spec: SiteSpec) -> Shape:
    return spec.out_features, spec.in_features


def _num_places(spec: SiteSpec, config: Config) -> int:
    own = config.for_site("n_frequency_pattern", spec.path)
    return config.integer("n_frequency") if own is None else int(own)


def _fourier_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    return SiteLayout(tensors={"fourierft_spectrum": ((_bounded(_num_places(spec, config), spec),),)})


def _bounded(num_places: int, spec: SiteSpec) -> int:
    if num_places > spec.out_features * spec.in_features:
        reason = f"is {num_places}; {spec.path} has {spec.out_features * spec.in_features} entries"
        raise contradiction("n_frequency", reason)
    return num_places


def _fourier_places(whole: Whole) -> Places:
    return _drawn(whole, {spec.path: _num_places(spec, whole.config) for spec in whole.targets})


def _drawn(whole: Whole, num_places: Mapping[str, int]) -> Places:
    most: dict[Shape, int] = {}
    for spec in whole.targets:
        most[_shape(spec)] = max(most.get(_shape(spec), 0), num_places[spec.path])
    seed = whole.config.integer("random_loc_seed")
    return {shape: _permuted(shape, seed)[:count].clone() for shape, count in most.items()}


def _permuted(shape: Shape, seed: int) -> Tensor:
    if shape[0] * shape[1] > MAX_PERMUTED:
        reason = f"asks for a permutation of all {shape[0] * shape[1]} entries of a weight; {MAX_PERMUTED} are served"
        raise contradiction("target_modules", f"{reason}; leave tables and heads out")
    return torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))


@compiles("FOURIERFT", schema=FOURIERFT, layout=_fourier_layout, prepare=_fourier_places)
def fourierft(site: Site) -> Affine:
    """The real part of the inverse Fourier transform of a sparse spectrum (arXiv:2405.03003, peft `FourierFTLayer`)."""
    values_N = site.config.number("scaling") * site.tensors["fourierft_spectrum"]
    shape = _shape(site.spec)
    places_N = site.prepared[shape][: len(values_N)]
    spectrum = Spectrum(places_N // shape[1], places_N % shape[1], values_N)
    return Affine(maps=(spectrum if _is_sparse(len(values_N), shape) else _multiplied_out(spectrum, shape),))


def _is_sparse(num_places: int, shape: Shape) -> bool:
    """Whether places and values, three numbers each, take less than a matrix of the shape."""
    return 3 * num_places < shape[0] * shape[1]


def _multiplied_out(given: Spectrum, shape: Shape) -> Dense:
    spectrum_OI = torch.zeros(shape).index_put((given.out_N, given.in_N), given.values_N)
    return Dense(torch.fft.ifft2(spectrum_OI).real)


# ---- WaveFT


def _wave_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:
    family = config.text("wavelet_family")
    if config.flag("use_idwt") and family not in LOW_PASS:
        reason = f"is {quoted(family)}, for which peft has no working filter; it has those of {', '.join(LOW_PASS)}"
        raise contradiction("wavelet_family", reason)
    if config.flag("proportional_parameters"):  # what the site's share is depends on all sites: compiling tells
        num_places = (stored.get("waveft_spectrum") or (1,))[0]
    else:
        num_places = _num_places(spec, config)
    return SiteLayout(tensors={"waveft_spectrum": ((_bounded(num_places, spec),),)})


def _wave_places(whole: Whole) -> Places:
    shares = {spec.path: _num_places(spec, whole.config) for spec in whole.targets}
    if whole.config.flag("proportional_parameters"):
        shares = _proportional(whole)
    return _drawn(whole, shares)


def _proportional(whole: Whole) -> dict[str, int]:
    """The places of all sites together, dealt out by size; each site gets one at least."""
    sizes = {spec.path: spec.out_features * spec.in_features for spec in whole.targets}
    total, budget = sum(sizes.values()), whole.config.integer("n_frequency") * len(sizes)
    return {path: max(1, round(size / total * budget)) for path, size in sizes.items()}


@compiles("WAVEFT", schema=WAVEFT, layout=_wave_layout, prepare=_wave_places)
def waveft(site: Site) -> Affine:
    """The inverse wavelet transform of a sparse spectrum, or the sparse matrix itself without one.

    arXiv:2505.12532, peft `WaveFTLayer`.
    """
    values_N = site.config.number("scaling") * site.tensors["waveft_spectrum"]
    places_N = site.prepared[_shape(site.spec)]
    if site.config.flag("proportional_parameters") and len(places_N) != len(values_N):
        reason = f"has {len(values_N)} values; this site's share of those of all sites is {len(places_N)}"
        raise disagreement(f"{site.spec.path}.waveft_spectrum", reason)
    places_N = places_N[: len(values_N)]
    out_N, in_N = places_N // site.spec.in_features, places_N % site.spec.in_features
    if not site.config.flag("use_idwt"):
        return Affine(maps=(Sparse(out_N, in_N, values_N),))
    return Affine(maps=(_by_entries(_synthesised(site, out_N, in_N, values_N)),))


def _by_entries(weight_OI: Tensor) -> Sparse | Dense:
    """Short wavelets leave most of a matrix zero: its other entries where they are few, else all of it."""
    is_other = weight_OI != 0
    if ENTRY_COST * int(is_other.sum()) >= weight_OI.numel():
        return Dense(weight_OI)
    out_N, in_N = is_other.nonzero(as_tuple=True)
    return Sparse(out_N, in_N, weight_OI[out_N, in_N])


def _synthesised(site: Site, out_N: Tensor, in_N: Tensor, values_N: Tensor) -> Tensor:
    """The matrix whose spectrum has these values: in the middle of a larger one, which loses its borders again."""
    family, shape = site.config.text("wavelet_family"), _shape(site.spec)
    lost = len(LOW_PASS[family]) - 2
    sides = [(size + lost + 1) // 2 * 2 for size in shape]
    top, left = ((side - size) // 2 for side, size in zip(sides, shape, strict=True))
    bands = torch.zeros(*sides).index_put((out_N + top, in_N + left), values_N)
    return synthesis(bands, family)[: shape[0], : shape[1]]  # one row or column too many where a side is odd
