"""LoRA on bare parameters (`target_parameters`): a mixture's fused experts, its router, a linear layer's weight.

peft wraps a module once for each of its parameters, in the order in which they are registered; a key says how deep
its wrapper lies and not whose it is (peft `ParamWrapper`).
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from peft_serve.adapters.base import Base, SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.methods.fields import contradiction
from peft_serve.adapters.methods.lora_config import Variant, rank_at, scale_at, variant
from peft_serve.adapters.primitives import ExpertFactors, Experts
from peft_serve.adapters.registry import Shape, Site, SiteLayout

FIELD: Final = "target_parameters"
BARE: Final = frozenset({SiteKind.EXPERTS, SiteKind.ROUTER, SiteKind.LINEAR})


def _endings(path: str) -> set[str]:
    """The path, and what follows each of its dots."""
    parts = path.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def is_targeted(path: str, config: Config) -> bool:
    """Whether a parameter's path is one of `target_parameters` or ends with `.` and one."""
    return not _endings(path).isdisjoint(config.names(FIELD))


def sites_of_parameters(config: Config, base: Base) -> frozenset[str]:
    return frozenset(
        path
        for path, spec in base.sites.items()
        if spec.kind in BARE and any(is_targeted(f"{path}.{name}", config) for name in spec.parameters)
    )


def unknown_parameters(config: Config, base: Base) -> list[str]:
    """Names in `target_parameters` that no parameter goes by; peft warns of them and serves the rest."""
    paths = (f"{path}.{name}" for path, spec in base.sites.items() if spec.kind in BARE for name in spec.parameters)
    known = frozenset().union(*(_endings(path) for path in paths)) if config.names(FIELD) else frozenset()
    return [name for name in config.names(FIELD) if name not in known]


def parameter_path(spec: SiteSpec, config: Config) -> str:
    """What rank and scale of a dense site go by: its weight's own path where that is what the config names."""
    path = f"{spec.path}.weight"
    return path if config.names(FIELD) and is_targeted(path, config) else spec.path


def layout_of_experts(spec: SiteSpec, config: Config) -> SiteLayout:
    """The outermost wrapper has no prefix, and each one inside it `base_layer.` once more."""
    _check(spec, config)
    tensors: dict[str, tuple[Shape, ...]] = {}
    for name, prefix in _wrappers(spec, config):
        rank = rank_at(config, f"{spec.path}.{name}")
        num_experts, num_out, num_in = _sizes(spec, name)
        tensors[f"{prefix}lora_A.weight"] = ((num_experts * rank, num_in),)
        tensors[f"{prefix}lora_B.weight"] = ((num_out, num_experts * rank),)
    ranks = [rank_at(config, f"{spec.path}.{name}") for name, _ in _wrappers(spec, config)]
    return SiteLayout(tensors=tensors, rank=max(ranks))


def check_router(spec: SiteSpec, config: Config) -> None:
    """Raise `AdapterInvalid` unless it is the router's weight that the config names; peft wraps no whole router."""
    _check_targets(spec, config)
    if not is_targeted(f"{spec.path}.weight", config):
        raise contradiction(FIELD, f"does not name {spec.path}.weight, and a router has no other matrix")


def _check(spec: SiteSpec, config: Config) -> None:
    _check_targets(spec, config)
    unfit = [name for name, _ in _wrappers(spec, config) if len(spec.parameters[name]) != 3]
    if unfit:
        raise contradiction(FIELD, f"names {spec.path}.{unfit[0]}; of experts, only stacks of matrices are served")


def _check_targets(spec: SiteSpec, config: Config) -> None:
    targeted = [name for name, _ in _wrappers(spec, config)]
    if not targeted:
        raise contradiction(FIELD, f"names no parameter of {spec.path}, which has tensors")
    if variant(config) is not Variant.PLAIN or config.flag("lora_bias"):
        raise contradiction(FIELD, "is not defined together with a variant of LoRA or lora_bias; use one of them")
    if config.raw("init_lora_weights") in ("pissa", "olora"):
        raise contradiction(FIELD, "is not defined together with this init_lora_weights; initialise plainly")


def _wrappers(spec: SiteSpec, config: Config) -> list[tuple[str, str]]:
    """(parameter, prefix of its tensors), in the order of registration: the last one is outermost."""
    names = [name for name in spec.parameters if is_targeted(f"{spec.path}.{name}", config)]
    return [(name, "base_layer." * (len(names) - 1 - i)) for i, name in enumerate(names)]


def _sizes(spec: SiteSpec, name: str) -> tuple[int, int, int]:
    """(experts, out, in) of a stack of matrices, however it is stored."""
    num_experts, first, second = spec.parameters[name]
    return (num_experts, second, first) if spec.is_transposed else (num_experts, first, second)


def experts(site: Site) -> Experts:
    """W_e + s B_e A_e. A is stored [experts * r, in] and B [out, r * experts], the expert last (`get_delta_weight`)."""
    factors = {}
    for name, prefix in _wrappers(site.spec, site.config):
        num_experts = site.spec.parameters[name][0]
        a = site.tensors[f"{prefix}lora_A.weight"]
        a_ERI = a.reshape(num_experts, -1, a.shape[1])
        scale = scale_at(site.config, f"{site.spec.path}.{name}", a_ERI.shape[1])
        factors[name] = ExpertFactors(a_ERI, scale * _by_expert(site.tensors[f"{prefix}lora_B.weight"], num_experts))
    return Experts(factors)


def _by_expert(b: Tensor, num_experts: int) -> Tensor:
    return b.reshape(len(b), -1, num_experts).permute(2, 0, 1)
