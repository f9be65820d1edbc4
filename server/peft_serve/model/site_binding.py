"""What is bound to the modules of a model in place of their forward, by the kind of site that they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.model.attention_site import AttentionSite
from peft_serve.model.expert_site import ExpertsSite
from peft_serve.model.router_site import RouterSite
from peft_serve.model.routing import Lane, Stream
from peft_serve.model.sites_forward import DenseSite, NormSite, Site
from peft_serve.model.sublayer_places import Around
from peft_serve.model.sublayers import bind_sublayer
from peft_serve.model.terms.shared import SharedFactors

Bind = Callable[[SiteSpec, nn.Module, Lane], Site]
"""Makes the site of a module."""


def bound_sites(
    modules: Mapping[str, nn.Module],
    sublayers: Mapping[str, Around],
    specs: Mapping[str, SiteSpec],
    lanes: Mapping[str, Lane],
    shared: SharedFactors,
    like: Tensor,
) -> dict[str, Site]:
    """The site of each path, bound to its module or around its sublayer; one module has one site, whatever its paths.

    `like` is a weight of the model that is not quantised.
    """
    binders = _binders(shared, like)
    sites: dict[str, Site] = {}
    by_module: dict[nn.Module, Site] = {}
    for path, module in modules.items():
        spec = specs[path]
        if module not in by_module:
            by_module[module] = binders[spec.kind](spec, module, lanes[path])
        sites[path] = by_module[module]
    for module, site in by_module.items():
        module.__dict__["forward"] = site.forward
    for path, around in sublayers.items():
        sites[path] = bind_sublayer(around, lanes[path], like)
    return sites


def shared_sites(sites: Mapping[str, Site], streams: Mapping[str, Stream]) -> dict[Stream, tuple[Site, ...]]:
    """The sites that each stream shares with another one, by the streams of paths."""
    by_stream = {stream: {sites[path] for path, own in streams.items() if own is stream} for stream in Stream}
    return {
        stream: tuple(here & set().union(*(there for other, there in by_stream.items() if other is not stream)))
        for stream, here in by_stream.items()
    }


def _binders(shared: SharedFactors, like: Tensor) -> Mapping[SiteKind, Bind]:
    dense = partial(DenseSite, shared=shared, like=like)
    return {
        SiteKind.LINEAR: dense,
        SiteKind.CONV1D: dense,
        SiteKind.EMBEDDING: dense,
        SiteKind.NORM: NormSite,
        SiteKind.EXPERTS: ExpertsSite,
        SiteKind.ROUTER: RouterSite,
        SiteKind.ATTENTION: partial(AttentionSite, like=like),
    }
