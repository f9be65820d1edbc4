"""Methods that compile to vectors which scale what goes into a site or out of it, or are added to that."""

from __future__ import annotations

from typing import Final

from peft_serve.adapters import config_schema as rules
from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config, ConfigSchema
from peft_serve.adapters.primitives import Affine
from peft_serve.adapters.registry import Site, SiteLayout, Stored, compiles

IA3: Final = ConfigSchema(
    optional={"target_modules": rules.names_or_text, "exclude_modules": rules.names_or_text},
    inert=frozenset({"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"}),  # the stored shape tells
)


def _layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    return SiteLayout(tensors={"ia3_l": ((spec.out_features, 1), (1, spec.in_features))})


@compiles("IA3", schema=IA3, layout=_layout)
def ia3(site: Site) -> Affine:
    """y = W (l * x) + b for a feed-forward site, stored [1, i]; y = l * (W x + b) for any other, stored [o, 1].

    arXiv:2205.05638, peft `IA3Layer`. The bias is scaled with the output.
    """
    scale = site.tensors["ia3_l"]
    if tuple(scale.shape) == (site.spec.out_features, 1):
        return Affine(out_scale=scale.flatten())
    return Affine(in_scale=scale.flatten())


BEFT: Final = ConfigSchema(
    optional={"target_modules": rules.names_or_text, "exclude_modules": rules.names_or_text},
    inert=frozenset({"init_weights"}),
)


def _beft_layout(spec: SiteSpec, config: Config, stored: Stored) -> SiteLayout:  # noqa: ARG001 - one signature for every method
    return SiteLayout(tensors={"beft_bias": ((1, spec.out_features),)})


@compiles("BEFT", schema=BEFT, layout=_beft_layout, kinds=frozenset({SiteKind.LINEAR}))
def beft(site: Site) -> Affine:
    """y = W x + b + c, c the learned bias, whether the base has one or not (arXiv:2509.15974, peft `BeftLayer`)."""
    return Affine(shift=site.tensors["beft_bias"].flatten())
