"""The tensors that AdapterHub saves at a place, by suffix, with the shapes that config and base ask for."""

from __future__ import annotations

from collections.abc import Mapping

from peft_serve.adapters.adapterhub.config import HubConfig
from peft_serve.adapters.adapterhub.places import SUBLAYERS, Place, Role
from peft_serve.adapters.adapterhub.reft import acts_behind, unit_shapes
from peft_serve.adapters.adapterhub.schemas import place_of
from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.registry import Shape
from peft_serve.errors import AdapterInvalid, Refusal

Shapes = Mapping[str, Shape]


def is_wanted(place: Place, hub: HubConfig) -> bool:
    """Whether the config says that the adapter acts at a place."""
    if place.role is Role.EMBEDDED:
        return hub.bottleneck is not None and hub.bottleneck.raw("inv_adapter") is not None
    if place.role is Role.AFTER_LAYER:
        return hub.reft is not None and acts_behind(place.layer, hub.reft)
    config = hub.bottleneck if place.role in SUBLAYERS else hub.lora
    left_out = None if config is None else config.raw("leave_out")
    if config is None or (isinstance(left_out, list) and place.layer in left_out):
        return False
    if place.role in (Role.QUERY, Role.KEY, Role.VALUE, Role.FUSED):
        named = config.names("attn_matrices")
        return config.flag("selfattn_lora") and (place.role is Role.FUSED or place.role.value in named)
    return config.flag(place.role.value)


def shapes_at(spec: SiteSpec, place: Place, hub: HubConfig) -> tuple[Shapes, int]:
    """The tensors at a place that is wanted, and the rank of the low-rank term they make; raises `AdapterInvalid`."""
    if place.role is Role.EMBEDDED:
        assert hub.bottleneck is not None, "an invertible adapter is part of a bottleneck's config"
        return _coupling(spec, hub.bottleneck), 0
    if place.role is Role.AFTER_LAYER:
        assert hub.reft is not None, "what leaves a layer is wanted by a ReFT"
        return unit_shapes(spec, hub.reft), hub.reft.integer("r")
    if place.role in SUBLAYERS:
        assert hub.bottleneck is not None, "a sublayer is wanted by a bottleneck"
        return _bottleneck(spec, place, hub.bottleneck), 0
    assert hub.lora is not None, "a linear layer is wanted by a LoRA"
    return _lora(spec, place, hub.lora)


def _bottleneck(spec: SiteSpec, place: Place, config: Config) -> Shapes:
    size = spec.out_features
    width = _width(size, _factor(config, place.layer))
    down = "adapter_down.1" if config.flag("ln_before") else "adapter_down.0"
    shapes: dict[str, Shape] = {
        f"{down}.weight": (width, size),
        f"{down}.bias": (width,),
        "adapter_up.weight": (size, width),
        "adapter_up.bias": (size,),
    }
    norms = ("adapter_down.0", "adapter_norm_before") if config.flag("ln_before") else ()
    for norm in (*norms, *(("adapter_norm_after",) if config.flag("ln_after") else ())):
        shapes |= {f"{norm}.weight": (size,), f"{norm}.bias": (size,)}
    scaling = config.raw("scaling")
    if scaling in ("learned", "channel"):
        shapes["scaling"] = (1,) if scaling == "learned" else (size,)
    return shapes


def _factor(config: Config, layer: int) -> float:
    factors = config.raw("reduction_factor")
    if isinstance(factors, dict):
        found = factors.get(str(layer), factors.get("default"))
        if found is None:
            reason = f"names neither layer {layer} nor a default; add one"
            raise AdapterInvalid([Refusal(place_of("reduction_factor"), reason)])
        return float(found)
    return config.number("reduction_factor")


def _width(size: int, factor: float) -> int:
    """Features of a bottleneck, as the library counts them."""
    return max(int(size // factor), 1)


def _coupling(spec: SiteSpec, config: Config) -> Shapes:
    left = spec.out_features // 2
    right = spec.out_features - left
    factor = config.number("inv_adapter_reduction_factor")
    shapes: dict[str, Shape] = {}
    for net, num_in, num_out in (("F", right, left), ("G", left, right)):
        width = int(num_in // factor)
        if not width:
            reason = f"is {factor:g}, which leaves nothing of {num_in} features; a network needs one at least"
            raise AdapterInvalid([Refusal(place_of("inv_adapter_reduction_factor"), reason)])
        shapes |= {f"{net}.0.weight": (width, num_in), f"{net}.0.bias": (width,)}
        shapes |= {f"{net}.2.weight": (num_out, width), f"{net}.2.bias": (num_out,)}
    return shapes


def _lora(spec: SiteSpec, place: Place, config: Config) -> tuple[Shapes, int]:
    parts = len(set(config.names("attn_matrices"))) if place.role is Role.FUSED else 1
    num_out = spec.out_features // 3 * parts if place.role is Role.FUSED else spec.out_features
    if config.text("composition_mode") == "scale":
        return {"lora_B": (num_out, 1)}, 0
    rank = config.integer("r")
    shapes: dict[str, Shape] = {"lora_A": (rank * parts, spec.in_features), "lora_B": (num_out, rank)}
    if config.flag("use_dora"):
        if spec.kind is SiteKind.CONV1D:
            reason = "cannot be run by adapters itself on GPT-2, so that no checkpoint of it means anything"
            raise AdapterInvalid([Refusal(place_of("use_dora"), reason)])
        shapes["m.weight"] = (spec.out_features, 1)
    return shapes, rank * parts
