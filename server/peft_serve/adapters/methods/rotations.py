"""Methods that rotate what goes into a site, or what comes out of it."""

from __future__ import annotations

import re
from typing import Final

import torch
from torch import Tensor

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import Base, SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.methods import work
from peft_serve.adapters.methods.fields import TARGETING, contradiction, disagreement, tuned_biases
from peft_serve.adapters.primitives import Affine, BlockDiagonal, Dense, Paired
from peft_serve.adapters.registry import SharedLayout, Site, SiteLayout, Stored, compiles

SIZE: Final = rules.integer(0, 1 << 20)
LINEAR: Final = frozenset({SiteKind.LINEAR})


def _skew(upper_NE: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices [n, k, k] from the entries above their diagonals."""
    rows, columns = torch.triu_indices(size, size, 1)
    matrix_NKK = upper_NE.new_zeros(upper_NE.shape[0], size, size)
    matrix_NKK[:, rows, columns] = upper_NE
    return matrix_NKK - matrix_NKK.transpose(1, 2)


def _cayley(skew_NKK: Tensor) -> Tensor:
    """(I - S)(I + S)^-1: orthogonal, and defined for every skew-symmetric S."""
    identity = torch.eye(skew_NKK.shape[-1])
    rotation: Tensor = torch.linalg.solve(identity + skew_NKK, identity - skew_NKK, left=False)
    return rotation


# ---- OFT

OFT: Final = ConfigSchema(
    optional={
        **TARGETING,
        "r": SIZE,
        "oft_block_size": SIZE,
        "coft": rules.flag,
        "eps": rules.number(1e6),
        "block_share": rules.flag,
        "use_cayley_neumann": rules.flag,
        "num_cayley_neumann_terms": rules.integer(1, 64),
        "bias": tuned_biases("oft"),
    },
    inert=frozenset({"module_dropout", "fan_in_fan_out", "init_weights"}),
)
NEUMANN_SINCE: Final = (0, 18, 0)
RELEASE: Final = re.compile(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})(\.?(dev|rc|a|b)\d*)?")


def _is_neumann(config: Config) -> bool:
    value = config.raw("use_cayley_neumann")
    return value is None or bool(value)  # peft's default


def _release(version: str) -> tuple[int, int, int, bool]:
    """(major, minor, patch, final) of a version; what is none, or is not given, comes before all releases."""
    found = RELEASE.match(version)
    if found is None:
        return (0, 0, 0, False)
    major, minor, patch = (int(found.group(i)) for i in (1, 2, 3))
    return (major, minor, patch, found.group(4) is None)


def _check_oft(config: Config, base: Base, stored: Stored) -> SharedLayout:  # noqa: ARG001 - one signature for all
    if config.raw("oft_block_size") is None:
        reason = "is missing: this is an OFT file of peft 0.15 or older, whose parameters mean something else; retrain"
        raise contradiction("oft_block_size", reason)
    if (config.integer("r") == 0) == (config.integer("oft_block_size") == 0):
        raise contradiction("oft_block_size", "and r: exactly one of them must be other than 0")
    if _is_neumann(config) and _release(config.text("peft_version")) < (*NEUMANN_SINCE, True):
        reason = "is older than 0.18 or missing: Cayley-Neumann rotations were parameterised differently then"
        raise contradiction("peft_version", f"{reason}; retrain, or train with use_cayley_neumann false")
    return SharedLayout()


def _nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` that peft takes instead of a number that is none (`adjust_oft_parameters`)."""
    if wanted >= size:
        return size
    higher = next(n for n in range(wanted, size + 1) if size % n == 0)
    lower = next(n for n in range(wanted, 0, -1) if size % n == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _oft_width(spec: SiteSpec) -> int:
    """The features that are rotated: a layer's inputs, the vectors that an embedding gives."""
    return spec.out_features if spec.kind is SiteKind.EMBEDDING else spec.in_features


def _oft_block(spec: SiteSpec, config: Config) -> int:
    width, count = _oft_width(spec), config.integer("r")
    if count:
        return width // _nearest_divisor(width, count)
    return _nearest_divisor(width, config.integer("oft_block_size"))


def _oft_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:
    if any(suffix.startswith("oft_r") for suffix in stored):
        reason = "is a tensor of peft 0.15 or older, which newer ones cannot load either; retrain"
        raise disagreement(f"{spec.path}.oft_r", reason)
    size = _oft_block(spec, config)
    count = 1 if config.flag("block_share") else _oft_width(spec) // size
    suffix = "oft_embedding_R.weight" if spec.kind is SiteKind.EMBEDDING else "oft_R.weight"
    num_powers = max(4, config.integer("num_cayley_neumann_terms", 5)) if _is_neumann(config) else 0
    return SiteLayout(
        tensors={suffix: ((count, size * (size - 1) // 2),)},
        num_values=_oft_width(spec) * size,
        work=work.solutions(count, size) + num_powers * count * work.product(size, size, size),
    )


@compiles("OFT", schema=OFT, layout=_oft_layout, kinds=LINEAR | {SiteKind.EMBEDDING}, shared=_check_oft)
def oft(site: Site) -> Affine:
    """y = W (x R) + b, R block-diagonal and orthogonal; an embedding's output is rotated instead of its input.

    arXiv:2306.07280, arXiv:2506.19847, peft `OFTRotationModule`. Neumann series and exact Cayley map turn in
    opposite directions there; with `coft` the parameters are first brought within eps of no rotation.
    """
    (upper_NE,) = site.tensors.values()
    size = _oft_block(site.spec, site.config)
    skew_NKK = _skew(upper_NE, size)
    if site.config.flag("coft"):
        skew_NKK = _constrained(skew_NKK, site.config.number("eps") if site.config.raw("eps") is not None else 6e-5)
    num_terms = site.config.integer("num_cayley_neumann_terms", 5)
    blocks_NKK = _neumann(skew_NKK, num_terms) if _is_neumann(site.config) else _cayley(skew_NKK)
    mixer = BlockDiagonal(blocks_NKK.expand(_oft_width(site.spec) // size, -1, -1))
    return Affine(out_mix=mixer) if site.spec.kind is SiteKind.EMBEDDING else Affine(in_mix=mixer)


def _constrained(skew_NKK: Tensor, eps: float) -> Tensor:
    """Each matrix brought to a norm of at most eps over the root of their number (peft `_project_batch`)."""
    bound = eps / skew_NKK.shape[0] ** 0.5
    norm_N11 = torch.linalg.vector_norm(skew_NKK, dim=(1, 2), keepdim=True)
    return torch.where(norm_N11 <= bound, skew_NKK, skew_NKK * (bound / norm_N11.clamp_min(1e-30)))


def _neumann(skew_NKK: Tensor, num_terms: int) -> Tensor:
    """I + 2 S + 2 S^2 + ... + S^m, the last power once: (I + S)(I - S)^-1 cut short (peft `_cayley_batch`)."""
    identity = torch.eye(skew_NKK.shape[-1]).expand_as(skew_NKK)
    if num_terms <= 2:
        return identity if num_terms == 1 else identity + 2 * skew_NKK
    total, power = identity + 2 * skew_NKK, skew_NKK
    for _ in range(2, max(num_terms, 4) - 1):  # one power at a time: all together would take a matrix for each
        power = power @ skew_NKK
        total = total + 2 * power
    return total + power @ skew_NKK


# ---- BOFT

BOFT: Final = ConfigSchema(
    optional={
        **TARGETING,
        "boft_block_size": SIZE,
        "boft_block_num": SIZE,
        "boft_n_butterfly_factor": rules.integer(1, 32),
        "bias": tuned_biases("boft"),
    },
    inert=frozenset({"boft_dropout", "fan_in_fan_out", "init_weights"}),
)


def _boft_blocks(spec: SiteSpec, config: Config) -> tuple[int, int]:
    """(number of blocks, their size)."""
    size, count = config.integer("boft_block_size", 4), config.integer("boft_block_num")
    if (size == 0) == (count == 0):
        raise contradiction("boft_block_size", "and boft_block_num: exactly one of them must be other than 0")
    given = size or count
    if spec.in_features % given:
        raise contradiction("boft_block_size", f"(or boft_block_num) {given} does not divide the inputs of {spec.path}")
    return (spec.in_features // size, size) if size else (count, spec.in_features // count)


def _boft_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:
    count, size = _boft_blocks(spec, config)
    num_factors = stored.get("boft_R", (1,))[0]
    # peft trains one factor, whatever the config says, where its CUDA extension cannot be built
    if num_factors not in (1, config.integer("boft_n_butterfly_factor", 1)):
        num_factors = config.integer("boft_n_butterfly_factor", 1)
    if num_factors > 1 and (size % 2 or count % 2 or count % 2 ** (num_factors - 1)):
        reason = f"is {num_factors}, which {count} blocks of {size} at {spec.path} do not allow; both must be even"
        raise contradiction("boft_n_butterfly_factor", f"{reason}; use fewer factors")
    rotations, scales = (num_factors, count, size, size), (spec.out_features, 1)
    o, i = spec.out_features, spec.in_features
    return SiteLayout(
        tensors={"boft_R": (rotations,), "boft_s": (scales,)},
        num_values=o * i if num_factors > 1 else 0,
        work=work.solutions(num_factors * count, size) + num_factors * work.product(o, i, size),
    )


@compiles("BOFT", schema=BOFT, layout=_boft_layout, kinds=LINEAR)
def boft(site: Site) -> Affine:
    """y = s * (W (x M)) + b, M a product of butterfly factors (arXiv:2311.06243, peft `BOFTLayer`).

    One factor is block-diagonal and rotates the input. The product of several is dense: the weight it makes of W,
    less W, is added.
    """
    parameters_FNKK = site.tensors["boft_R"]
    skew_FNKK = (parameters_FNKK - parameters_FNKK.transpose(-1, -2)) / 2
    blocks_FNKK = _cayley(skew_FNKK)
    scale_O, bias_O = site.tensors["boft_s"].flatten(), site.bias_O
    shift = None if bias_O is None else (1 - scale_O) * bias_O
    if len(blocks_FNKK) == 1:
        return Affine(in_mix=BlockDiagonal(blocks_FNKK[0]), out_scale=scale_O, shift=shift)
    weight_OI = site.weight_OI
    difference_OI = scale_O[:, None] * (_rotated(weight_OI, blocks_FNKK) - weight_OI)
    return Affine(out_scale=scale_O, shift=shift, maps=(Dense(difference_OI),))


def _rotated(weight_OI: Tensor, blocks_FNKK: Tensor) -> Tensor:
    """W M^T, M the product of P_f D_f P_f^T over the factors f, the first one innermost; D_f is block-diagonal."""
    num_out, num_in = weight_OI.shape
    _, count, size, _ = blocks_FNKK.shape
    for level, blocks_NKK in enumerate(blocks_FNKK):
        order = _butterfly(num_in, count // 2**level, size // 2)
        parts_ONK = weight_OI[:, order.argsort()].reshape(num_out, count, size)
        weight_OI = torch.einsum("onk,nck->onc", parts_ONK, blocks_NKK).reshape(num_out, num_in)[:, order]
    return weight_OI


def _butterfly(num_in: int, num_groups: int, half: int) -> Tensor:
    """In each group of features, its even runs of `half` before its odd ones (`block_butterfly_perm`)."""
    runs_GRH = torch.arange(num_in).reshape(num_groups, -1, half)
    return torch.cat([runs_GRH[:, 0::2], runs_GRH[:, 1::2]], dim=1).flatten()


# ---- RoAd

ROAD: Final = ConfigSchema(
    optional={
        "target_modules": rules.names_or_text,
        "exclude_modules": rules.names_or_text,
        "variant": rules.one_of("road_1", "road_2", "road_4"),
        "group_size": rules.integer(2, 1 << 20),
    },
    inert=frozenset({"init_weights"}),
)
VARIANT: Final = "road_1"
GROUP: Final = 64
HALVES: Final = {"road_1": 1, "road_2": 2, "road_4": 4}  # numbers stored for each two features


def _road_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for all
    group = config.integer("group_size", GROUP)
    if group % 2 or spec.out_features % group:
        raise contradiction("group_size", f"is {group}; it must be even and divide the outputs of {spec.path}")
    size = spec.out_features * HALVES[config.text("variant", VARIANT)] // 2
    return SiteLayout(tensors={"road_theta": ((size,),), "road_alpha": ((size,),)})


@compiles("ROAD", schema=ROAD, layout=_road_layout, kinds=LINEAR)
def road(site: Site) -> Affine:
    """Pairs of outputs turned and scaled: y = a cos(t) * z + a sin(t) * z', z = W x + b (arXiv:2409.00119).

    z' has the halves of each group of features exchanged, the new first one negated (peft `_apply_road`).
    """
    group = site.config.integer("group_size", GROUP)
    theta, alpha = (site.tensors[name] for name in ("road_theta", "road_alpha"))
    own_O, other_O = _columns(site.config.text("variant", VARIANT), group, theta, alpha)
    signs = torch.tensor([-1.0, 1.0])[:, None]
    other_O = (other_O.reshape(-1, 2, group // 2) * signs).flatten()
    return Affine(out_mix=Paired(own_O, other_O, group))


def _columns(variant: str, group: int, theta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of a feature and of its partner [o] (peft `_prepare_cols`): one set for both, for each, for all."""
    if variant == "road_4":
        theta_G2K, alpha_G2K = theta.reshape(-1, 2, group), alpha.reshape(-1, 2, group)
        own, other = alpha_G2K[:, 0] * theta_G2K[:, 0].cos(), alpha_G2K[:, 1] * theta_G2K[:, 1].sin()
        return own.flatten(), other.flatten()
    if variant == "road_1":
        theta, alpha = (v.reshape(-1, group // 2).repeat_interleave(2, dim=0).flatten() for v in (theta, alpha))
    return alpha * theta.cos(), alpha * theta.sin()
