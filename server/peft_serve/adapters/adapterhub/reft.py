"""ReFT as AdapterHub saves it: the tensors behind a layer, and the intervention they make.

Of LoReFT, NoReFT and DiReFT (arXiv:2404.03592) the first keeps the rows of its projection orthonormal, and the last
subtracts nothing. A unit for the first positions and one for the last are saved, tied ones once.

Formulas of `adapters` 1.3.0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peft_serve.adapters.base import SiteSpec
from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.registry import Shape
from peft_serve.adapters.sublayer_primitives import Intervention, SubspaceEdit

Tensors = Mapping[str, Tensor]


def acts_behind(layer: int, config: Config) -> bool:
    """Whether the config says that the adapter acts on what leaves a layer."""
    layers = config.raw("layers")
    return config.flag("output_reft") and (layers == "all" or (isinstance(layers, list) and layer in layers))


def unit_shapes(spec: SiteSpec, config: Config) -> dict[str, Shape]:
    """The tensors behind a layer by suffix, with their shapes."""
    size, rank = spec.out_features, config.integer("r")
    shapes: dict[str, Shape] = {}
    for unit in (0,) if config.flag("tied_weights") else (0, 1):
        source, projection = f"units.{unit}.learned_source", f"units.{unit}.projection"
        shapes |= {f"{source}.weight": (rank, size), f"{source}.bias": (rank,)}
        if config.flag("orthogonality"):
            most = max(rank, size)
            shapes |= {
                f"{projection}.parametrizations.weight.original": (rank, size),
                f"{projection}.parametrizations.weight.0.base": (most, most),
            }
        else:
            shapes[f"{projection}.weight"] = (rank, size)
    return shapes


def intervention(tensors: Tensors, config: Config) -> Intervention:
    """x + P^T (act(W x + b) - P x) at some positions: `ReftModule` and `ReftUnit` of `methods/reft.py`."""
    first = _unit(tensors, 0, is_orthogonal=config.flag("orthogonality"))
    activation = config.raw("non_linearity")
    return Intervention(
        first=first,
        last=first if config.flag("tied_weights") else _unit(tensors, 1, is_orthogonal=config.flag("orthogonality")),
        num_first=config.integer("prefix_positions"),
        num_last=config.integer("suffix_positions"),
        activation=None if activation is None else str(activation).lower(),
        subtracts=config.flag("subtract_projection"),
    )


def _unit(tensors: Tensors, unit: int, *, is_orthogonal: bool) -> SubspaceEdit:
    source, projection = f"units.{unit}.learned_source", f"units.{unit}.projection"
    if is_orthogonal:
        weight = f"{projection}.parametrizations.weight"
        projection_RD = _orthonormal(tensors[f"{weight}.original"], tensors[f"{weight}.0.base"])
    else:
        projection_RD = tensors[f"{projection}.weight"]
    return SubspaceEdit(tensors[f"{source}.weight"], tensors[f"{source}.bias"], projection_RD)


def _orthonormal(free_RD: Tensor, base: Tensor) -> Tensor:
    """The matrix of `torch.nn.utils.parametrizations.orthogonal`: base times Householder reflections of the tall side.

    A square matrix is base times the exponential of a skew-symmetric one.
    """
    is_wide = free_RD.shape[0] < free_RD.shape[1]
    tall = free_RD.float().T if is_wide else free_RD.float()
    if tall.shape[0] == tall.shape[1]:
        lower = tall.tril()
        columns = torch.matrix_exp(lower - lower.T)
    else:
        below = tall.tril(diagonal=-1)
        signs = tall.diagonal().int()
        columns = torch.linalg.householder_product(below, 2.0 / (1.0 + (below * below).sum(dim=0))) * signs
    made = base.float() @ columns
    return (made.T if is_wide else made).contiguous()
