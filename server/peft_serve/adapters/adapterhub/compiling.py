"""From the tensors at one place of an AdapterHub checkpoint to a primitive. Formulas of `adapters` 1.3.0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_serve.adapters.adapterhub.config import HubConfig
from peft_serve.adapters.adapterhub.places import SUBLAYERS, Place, Role
from peft_serve.adapters.adapterhub.reft import intervention
from peft_serve.adapters.adapterhub.schemas import place_of
from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.primitives import Affine, Edit, LowRank
from peft_serve.adapters.records import CONFIG_FILE
from peft_serve.adapters.registry import Site
from peft_serve.adapters.sublayer_primitives import Bottleneck, Coupling, LearnedNorm, Reads, TwoLayers
from peft_serve.errors import AdapterInvalid, Refusal

Tensors = Mapping[str, Tensor]
POST_ADD = "post_add"


@dataclass(frozen=True, slots=True)
class HubCompile:
    """Compiles the sites of one checkpoint, each by what its place is."""

    hub: HubConfig
    places: Mapping[str, Place]

    def __call__(self, site: Site) -> Edit:
        place = self.places[site.spec.path]
        if place.role in SUBLAYERS or place.role is Role.EMBEDDED:
            assert self.hub.bottleneck is not None, "the binder binds only what the config wants"
            compiled = coupling if place.role is Role.EMBEDDED else bottleneck
            return compiled(site.tensors, self.hub.bottleneck)
        if place.role is Role.AFTER_LAYER:
            assert self.hub.reft is not None, "the binder binds only what the config wants"
            return intervention(site.tensors, self.hub.reft)
        assert self.hub.lora is not None, "the binder binds only what the config wants"
        return lora(site, place, self.hub.lora)


def check_kept(place: Place, config: Config) -> None:
    """Raise `AdapterInvalid` for a residual that `adapters` has no formula for (`Adapter.pre_forward`)."""
    is_sum = config.raw("residual_before_ln") == POST_ADD and not config.flag("is_parallel")
    if is_sum and not (config.flag("original_ln_before") and place.has_norm):
        reason = "is post_add, which needs original_ln_before and a model with a norm behind its sublayers"
        raise AdapterInvalid([Refusal(place_of("residual_before_ln"), reason)])


def bottleneck(tensors: Tensors, config: Config) -> Bottleneck:
    """keep + s * up(act(down(read))): `Adapter` and `ParallelAdapter` of `methods/modeling.py`.

    Houlsby reads and keeps h (arXiv:1902.00751), Pfeiffer reads N(h + t) and keeps h (arXiv:2005.00247), the
    parallel form reads t (arXiv:2110.04366), AdapterPlus reads and keeps N(h + t) and ends the sublayer
    (arXiv:2406.06820).
    """
    has_before, has_after = config.flag("ln_before"), config.flag("ln_after")
    reads, keeps = _streams(config)
    down = "adapter_down.1" if has_before else "adapter_down.0"
    scaling = config.raw("scaling")
    return Bottleneck(
        down_BD=tensors[f"{down}.weight"],
        down_bias_B=tensors[f"{down}.bias"],
        up_DB=tensors["adapter_up.weight"],
        up_bias_D=tensors["adapter_up.bias"],
        activation=config.text("non_linearity").lower(),
        scale=tensors["scaling"] if "scaling" in tensors else torch.tensor([float(str(scaling))]),
        reads=reads,
        keeps=keeps,
        norm_before=_norm(tensors, "adapter_down.0") if has_before else None,
        norm_after=_norm(tensors, "adapter_norm_after") if has_after else None,
        norms_kept=has_after and config.flag("adapter_residual_before_ln") and not config.flag("is_parallel"),
        is_final=not config.flag("original_ln_after"),
    )


def _streams(config: Config) -> tuple[Reads, Reads]:
    """What is read and what is kept."""
    if config.flag("is_parallel"):
        return Reads.RESIDUAL, Reads.SUBLAYER
    if not config.flag("original_ln_before"):
        return Reads.SUBLAYER, Reads.SUBLAYER
    kept = config.raw("residual_before_ln")
    if kept == POST_ADD:
        return Reads.NORMED, Reads.SUMMED
    return Reads.NORMED, Reads.SUBLAYER if kept else Reads.NORMED


def _norm(tensors: Tensors, name: str) -> LearnedNorm:
    return LearnedNorm(tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def check_one_norm(tensors: Tensors, path: str) -> None:
    """The library keeps the norm before the bottleneck under two names; raise `AdapterInvalid` where they differ."""
    for name in ("weight", "bias"):
        twin = tensors.get(f"adapter_norm_before.{name}")
        if twin is not None and not torch.equal(twin, tensors[f"adapter_down.0.{name}"]):
            reason = f"differs from adapter_down.0.{name}, and both are one parameter; save the adapter again"
            raise AdapterInvalid([Refusal(f"{path}.adapter_norm_before.{name}", reason)])


def coupling(tensors: Tensors, config: Config) -> Coupling:
    """The invertible adapter of MAD-X, of the NICE design (arXiv:2005.00052, `NICECouplingBlock`)."""
    left, right = (
        TwoLayers(
            tensors[f"{net}.0.weight"],
            tensors[f"{net}.0.bias"],
            tensors[f"{net}.2.weight"],
            tensors[f"{net}.2.bias"],
        )
        for net in ("F", "G")
    )
    return Coupling(left, right, config.text("non_linearity").lower())


def lora(site: Site, place: Place, config: Config) -> Affine:
    """y = W x + b + s B A x with s = alpha / r; (IA)3: y = alpha * l * (W x + b) (`LoRALinear.forward`).

    DoRA: y = m / |W + B A| * (W x + b + s B A x), the norm being of the unscaled product and the bias in it.
    """
    b_OR = site.tensors["lora_B"]
    if config.text("composition_mode") == "scale":
        scale_O = b_OR.flatten()
        if place.role is Role.FUSED:
            scale_O = _spread(scale_O[:, None], site.spec.out_features, config, fill=1.0).flatten()
        return Affine(out_scale=config.number("alpha") * scale_O)
    scale = config.number("alpha") / config.integer("r")
    a_RI = site.tensors["lora_A"]
    if place.role is Role.FUSED:
        return Affine(delta=LowRank(a_RI, scale * _grouped(b_OR, site.spec.out_features, config)))
    if not config.flag("use_dora"):
        return Affine(delta=LowRank(a_RI, scale * b_OR))
    norm_O = torch.linalg.vector_norm(site.weight_OI + b_OR @ a_RI, dim=1)
    gain_O = site.tensors["m.weight"].flatten() / norm_O
    return Affine(out_scale=gain_O, delta=LowRank(a_RI, scale * gain_O[:, None] * b_OR))


def _parts(config: Config) -> list[int]:
    """Which thirds of a fused projection are adapted, in their order."""
    return [third for third, name in enumerate(("q", "k", "v")) if name in config.names("attn_matrices")]


def _grouped(b_OR: Tensor, num_out: int, config: Config) -> Tensor:
    """B of a fused projection, [o, parts * r]: each adapted third sees its own r rows of A (`LoRAMergedLinear`)."""
    parts, third, rank = _parts(config), num_out // 3, b_OR.shape[1]
    spread_OR = b_OR.new_zeros(num_out, rank * len(parts))
    for group, part in enumerate(parts):
        rows = slice(part * third, (part + 1) * third)
        spread_OR[rows, group * rank : (group + 1) * rank] = b_OR[group * third : (group + 1) * third]
    return spread_OR


def _spread(b_OR: Tensor, num_out: int, config: Config, *, fill: float) -> Tensor:
    """The rows of the adapted thirds in their places, `fill` in the others."""
    third = num_out // 3
    spread_OR = b_OR.new_full((num_out, b_OR.shape[1]), fill)
    for group, part in enumerate(_parts(config)):
        spread_OR[part * third : (part + 1) * third] = b_OR[group * third : (group + 1) * third]
    return spread_OR


def check_coupling(hub: HubConfig, *, is_encoder: bool) -> None:
    """Raise `AdapterInvalid` for a coupling that was trained with its inverse before the output embedding."""
    if not is_encoder and hub.model_class.endswith("AdapterModel"):
        reason = (
            f"was trained on {hub.model_class}, whose language head inverts it; served are those trained on the "
            "model classes of transformers (adapters.init)"
        )
        raise AdapterInvalid([Refusal(f"{CONFIG_FILE}: config.inv_adapter", reason)])
