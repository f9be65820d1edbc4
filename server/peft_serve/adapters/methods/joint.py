"""Methods that write the weights of one role in all layers in a common basis."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from peft_serve.adapters.base import Base, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.methods import work
from peft_serve.adapters.methods.fields import LAYERS, TARGETS, disagreement, tuned_biases
from peft_serve.adapters.methods.forms import num_dense
from peft_serve.adapters.primitives import Affine, Dense
from peft_serve.adapters.registry import DENSE, Shape, SharedLayout, Site, SiteLayout, Stored, compiles

BASIS: Final = "frod_V."  # and the name of a role, as in the next two
PLACES: Final = "frod_s_indices."
SIZE: Final = "frod_s_size."
LEAST_LENGTH: Final = 1e-12


def _saved_projection(value: object) -> str | None:
    if value is True:
        return None
    return (
        "true: without its bases a checkpoint hangs on the signs of eigenvectors, which are not the same on every "
        "machine; save it again with save_projection=True"
    )


FROD: Final = ConfigSchema(
    required={"save_projection": _saved_projection},
    optional={**TARGETS, **LAYERS, "bias": tuned_biases("frod")},
    inert=frozenset(
        {
            "projection_prng_key",
            "frod_dropout",
            "fan_in_fan_out",
            "init_weights",
            "sparse_rate",
            "regularization_alpha",
            "progressbar",
            "runtime_offload_base_weight",
        }
    ),
)


def role(path: str) -> str:
    """The role of a module, which its like in other layers share: the last parts of its path, as peft names it."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"  # BERT's, which would else be taken for its feed-forward output
    return f"{parts[-2]}_{parts[-1]}"


def _shared(config: Config, base: Base, stored: Stored) -> SharedLayout:  # noqa: ARG001 - one signature for every method
    """Of each role that has a basis: the basis, and which of its entries were trained."""
    widths = {(role(path), spec.in_features) for path, spec in base.sites.items() if spec.kind in DENSE}
    tensors: dict[str, Shape] = {}
    indices: dict[str, int] = {}
    for name, width in widths:
        places = stored.get(f"{PLACES}{name}", ())
        if stored.get(f"{BASIS}{name}") == (width, width) and len(places) == 2 and places[1] <= width * width:
            tensors |= {f"{BASIS}{name}": (width, width), f"{PLACES}{name}": (2, places[1]), f"{SIZE}{name}": (2,)}
            indices |= {f"{PLACES}{name}": width, f"{SIZE}{name}": width + 1}
    return SharedLayout(tensors=tensors, indices=indices)


def _layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    num_values = stored.get("frod_lambda_s_values", ())[:1]
    width = spec.in_features
    return SiteLayout(
        tensors={"frod_lambda_l": ((width,),), "frod_lambda_s_values": (num_values or (1,),)},
        num_values=num_dense(spec),
        work=work.solutions(1, width) + 3 * work.product(spec.out_features, width, width),
    )


@compiles("FROD", schema=FROD, layout=_layout, shared=_shared, may_be_empty=True)
def frod(site: Site) -> Affine:
    """U (S + diag l) V^T in place of W, as a difference to it (doi:10.1609/aaai.v40i31.39813, peft `FrodLayer`).

    V is the basis of the site's role; the columns of U are those of W V^-T at unit length, found in float64.
    """
    name, width = role(site.spec.path), site.spec.in_features
    basis, places, values = _of_role(site, name, width)
    middle = torch.diag(site.tensors["frod_lambda_l"])
    middle = middle.index_put((places[0], places[1]), values, accumulate=True)
    weight_OI = site.weight_OI
    return Affine(maps=(Dense(_directions(weight_OI, basis, site.spec.path) @ middle @ basis.T - weight_OI),))


def _of_role(site: Site, name: str, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Basis, places of the trained entries, and their values at this site."""
    basis = site.shared.get(f"{BASIS}{name}")
    if basis is None or basis.shape[0] != width:
        raise disagreement(f"base_model.{BASIS}{name}", f"is missing or not [{width}, {width}]; save the adapter again")
    if site.shared[f"{SIZE}{name}"].tolist() != [width, width]:
        raise disagreement(f"base_model.{SIZE}{name}", f"is not [{width}, {width}]; save the adapter again")
    places, values = site.shared[f"{PLACES}{name}"], site.tensors["frod_lambda_s_values"]
    if places.shape[1] != values.shape[0]:
        reason = f"has {values.shape[0]} values for {places.shape[1]} places; save the adapter again"
        raise disagreement(f"{site.spec.path}.frod_lambda_s_values", reason)
    return basis, places.long(), values  # no places at all have lost their type


def _directions(weight_OI: Tensor, basis: Tensor, path: str) -> Tensor:
    """The columns of W V^-T at unit length, by a pseudo-inverse where V has none; columns of no length stay zero."""
    weight, square = weight_OI.double(), basis.double()
    try:
        columns = torch.linalg.solve(square, weight.T).T
    except LinAlgError:
        columns = _by_pseudo_inverse(weight, square, path)
    lengths = torch.linalg.vector_norm(columns, dim=0)
    return torch.where(lengths > LEAST_LENGTH, columns / lengths.clamp(min=LEAST_LENGTH), 0.0).float()


def _by_pseudo_inverse(weight: Tensor, basis: Tensor, path: str) -> Tensor:
    try:
        inverse: Tensor = torch.linalg.pinv(basis, rtol=1e-6)
    except LinAlgError:
        raise disagreement(f"base_model.{BASIS}{role(path)}", "has no pseudo-inverse; save the adapter again") from None
    return weight @ inverse.T
