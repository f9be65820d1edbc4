"""LoRA variants that changed the base when training began: the change as one more low-rank term.

Only what the base itself determines is served. Signs of singular vectors, and of the columns of Q, cancel in the
products that are used here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.config_schema import Config
from peft_serve.adapters.methods import work
from peft_serve.adapters.methods.lora_config import BASE_CHANGING_INITS, CONVERT, Variant, variant
from peft_serve.adapters.primitives import LowRank
from peft_serve.adapters.registry import Site
from peft_serve.adapters.targets import tie_partners
from peft_serve.errors import AdapterInvalid, Refusal


def change_of_base(site: Site, rank: int, scale: float) -> LowRank | None:
    """What the adapter was trained to find missing in the base's weight, or None."""
    initialisation = site.config.raw("init_lora_weights")
    is_kasa = variant(site.config) is Variant.KASA
    if site.spec.kind is SiteKind.EMBEDDING or not (is_kasa or initialisation in BASE_CHANGING_INITS):
        return None  # peft changes no embedding
    _refuse_shared_weight(site)
    if is_kasa:
        return _without_smallest(site.weight_OI, rank)
    if initialisation == "pissa":
        return _without_largest(site.weight_OI, rank)
    return _without_first_of_qr(site.weight_OI, rank, scale)


def work_of_change(spec: SiteSpec, config: Config) -> int:
    """The floating-point operations of finding it."""
    initialisation = config.raw("init_lora_weights")
    if spec.kind is SiteKind.EMBEDDING:
        return 0
    if variant(config) is Variant.KASA or initialisation == "pissa":
        return work.singular_values(spec.out_features, spec.in_features)
    return work.orthogonal(spec.out_features, spec.in_features) if initialisation == "olora" else 0


def _refuse_shared_weight(site: Site) -> None:
    """peft changes the weight in place, and with it every other module that shares it."""
    partners = sorted(tie_partners(site.base, site.spec.path))
    if partners:
        reason = (
            f"changed a weight that it shares with {partners[0]} when training began; leave it out of target_modules"
        )
        raise AdapterInvalid([Refusal(site.spec.path, f"{reason}, or {CONVERT}")])


def joined(first: LowRank, second: LowRank | None) -> LowRank:
    """Both terms as one."""
    if second is None:
        return first
    return LowRank(torch.cat([first.a_RI, second.a_RI]), torch.cat([first.b_OR, second.b_OR], dim=1))


def _without_smallest(weight_OI: Tensor, rank: int) -> LowRank:
    """KaSA drops the r smallest singular components (arXiv:2412.06071, peft `KasaLinearVariant`)."""
    u_OK, s_K, v_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    return LowRank(v_KI[-rank:], -u_OK[:, -rank:] * s_K[-rank:])


def _without_largest(weight_OI: Tensor, rank: int) -> LowRank:
    """PiSSA takes the r largest into A and B (arXiv:2404.02948, peft `LoraLayer.pissa_init`)."""
    u_OK, s_K, v_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    return LowRank(v_KI[:rank], -u_OK[:, :rank] * s_K[:rank])


def _without_first_of_qr(weight_OI: Tensor, rank: int, scale: float) -> LowRank:
    """OLoRA takes the first r columns of Q and rows of R, times the scale (arXiv:2406.01775, `olora_init`)."""
    q_OK, r_KI = torch.linalg.qr(weight_OI)
    return LowRank(r_KI[:rank], -scale * q_OK[:, :rank])
