"""Methods that cut a site into tiles and let some of them share what is learned."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.methods import work
from peft_serve.adapters.methods.fields import LAYERS, RANK, TARGETING, TARGETS, contradiction, tuned_biases
from peft_serve.adapters.methods.forms import low_rank_or_dense, num_dense, num_factored, served_rank
from peft_serve.adapters.primitives import Affine, Dense
from peft_serve.adapters.registry import Shape, Site, SiteLayout, Stored, compiles

# ---- GraLoRA

GRALORA: Final = ConfigSchema(
    required={"r": RANK, "gralora_k": RANK, "alpha": rules.number(1e6)},
    optional={**TARGETS, **LAYERS, "hybrid_r": rules.integer(0, 1 << 20), "bias": tuned_biases("gralora")},
    inert=frozenset({"gralora_dropout", "fan_in_fan_out", "init_weights"}),
)


def _gralora_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    r, k, hybrid = config.integer("r"), config.integer("gralora_k"), config.integer("hybrid_r")
    o, i = spec.out_features, spec.in_features
    if r % k or o % k or i % k:
        raise contradiction("gralora_k", f"is {k}; it must divide r ({r}) and the sides [{o}, {i}] of {spec.path}")
    tensors: dict[str, tuple[Shape, ...]] = {"gralora_A": ((k, i // k, r),), "gralora_B": ((k, r, o // k),)}
    if hybrid:
        tensors["gralora_A_general.weight"] = ((hybrid, i),)
        tensors["gralora_B_general.weight"] = ((o, hybrid),)
    rank = k * r + hybrid
    return SiteLayout(tensors=tensors, rank=served_rank(spec, rank), num_values=num_factored(spec, rank))


@compiles("GRALORA", schema=GRALORA, layout=_gralora_layout)
def gralora(site: Site) -> Affine:
    """k x k tiles of low-rank maps, and a plain one over all (arXiv:2505.20355, peft `GraloraLayer`).

    Tile (j, n) of the outputs and inputs multiplies the j-th part of A_n's ranks by the n-th part of B_j's. Laid
    side by side, the tiles' ranks are those of one map of rank k r. The scale is alpha / (r + hybrid_r).
    """
    a_NIR, b_NRO = site.tensors["gralora_A"], site.tensors["gralora_B"]
    hybrid = site.config.integer("hybrid_r")
    scale = site.config.number("alpha") / (a_NIR.shape[2] + hybrid)
    general = [site.tensors[f"gralora_{x}_general.weight"] for x in "AB"] if hybrid else None
    if not served_rank(site.spec, a_NIR.shape[0] * a_NIR.shape[2] + hybrid):
        weight = _tiled(a_NIR, b_NRO)
        return Affine(maps=(Dense(scale * (weight if general is None else weight + general[1] @ general[0])),))
    a_RI, b_OR = _side_by_side(a_NIR), _side_by_side(b_NRO.transpose(1, 2)).T
    # A's ranks are counted by input tile, output tile and part; B's by output tile, input tile and part.
    k, part = a_NIR.shape[0], a_NIR.shape[2] // a_NIR.shape[0]
    b_OR = b_OR.reshape(-1, k, k, part).transpose(1, 2).flatten(start_dim=1)
    if general is not None:
        a_RI, b_OR = torch.cat([a_RI, general[0]]), torch.cat([b_OR, general[1]], dim=1)
    return Affine(**low_rank_or_dense(a_RI, scale * b_OR))


def _side_by_side(tiles_NFR: Tensor) -> Tensor:
    """[n r, n f]: the ranks of each tile, zero outside of its own features."""
    num, size, r = tiles_NFR.shape
    apart = torch.zeros(num, r, num, size)
    apart.diagonal(dim1=0, dim2=2).copy_(tiles_NFR.permute(2, 1, 0))
    return apart.reshape(num * r, num * size)


def _tiled(a_NIR: Tensor, b_NRO: Tensor) -> Tensor:
    """The whole [out, in] matrix, tile by tile; it needs no more memory than the result."""
    k, i, r = a_NIR.shape
    o = b_NRO.shape[2]
    weight_JONI = torch.einsum("nijs,jnso->joni", a_NIR.reshape(k, i, k, r // k), b_NRO.reshape(k, k, r // k, o))
    return weight_JONI.reshape(k * o, k * i)


# ---- MiSS


def _mode(value: object) -> str | None:
    return None if isinstance(value, bool) or value in ("bat", "mini") else 'true, false, "bat" or "mini"'


MISS: Final = ConfigSchema(
    required={"r": RANK},
    optional={**TARGETING, "mini_r": RANK, "init_weights": _mode, "bias": tuned_biases("MiSS")},
    inert=frozenset({"miss_dropout"}),
)


def _miss_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    r, mini, mode = config.integer("r"), config.integer("mini_r", 1), config.raw("init_weights")
    o, i = spec.out_features, spec.in_features
    if r > i:
        raise contradiction("r", f"is {r}; {spec.path} has {i} inputs")
    if mode == "bat":
        if o % r or i % r:
            raise contradiction("r", f"is {r}; {spec.path} has [{o}, {i}], which it does not divide")
        size = work.product(o, r, i)
        return SiteLayout(tensors={"miss_block": ((o // r, r, r),)}, num_values=num_dense(spec), work=size)
    if mode == "mini" and o % mini:
        raise contradiction("mini_r", f"is {mini}; {spec.path} has {o} outputs, which it does not divide")
    stored_columns = mini if mode == "mini" else o
    return SiteLayout(
        tensors={"miss_block": ((r, stored_columns),)},
        rank=served_rank(spec, r),
        num_values=num_factored(spec, r),
    )


@compiles("MISS", schema=MISS, layout=_miss_layout, kinds=frozenset({SiteKind.LINEAR}))
def miss(site: Site) -> Affine:
    """M^T times the sum of x cut into parts of r features (arXiv:2409.15371, peft `MissLinear`).

    The sum is a product with the identity, repeated and cut to the inputs. "mini" saves the first columns of M,
    which repeat. "bat" adds W_jn M_j + M_j to every tile W_jn of [r, r].
    """
    block = site.tensors["miss_block"]
    if site.config.raw("init_weights") == "bat":
        return Affine(maps=(Dense(_bat(site.weight_OI, block)),))
    r = block.shape[0]
    b_OR = block.repeat(1, site.spec.out_features // block.shape[1]).T
    if not served_rank(site.spec, r):
        return Affine(maps=(Dense(_across(b_OR, site.spec.in_features)),))
    return Affine(**low_rank_or_dense(_across(torch.eye(r), site.spec.in_features), b_OR))


def _across(tile: Tensor, width: int) -> Tensor:
    """A tile repeated along its columns, and cut to the width."""
    return tile.repeat(1, -(-width // tile.shape[1]))[:, :width]


def _bat(weight_OI: Tensor, block_JRR: Tensor) -> Tensor:
    num, r, _ = block_JRR.shape
    tiles = weight_OI.reshape(num, r, -1, r).transpose(1, 2)  # [num, in / r, r, r]
    added: Tensor = tiles @ block_JRR[:, None] + block_JRR[:, None]
    return added.transpose(1, 2).reshape(weight_OI.shape)
