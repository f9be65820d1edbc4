"""Random low-rank adapters for a base of any size, as compiled, on the device or on the host.

Made where they are used: a thousand million random numbers take a host minutes and a GPU a blink.
"""

from typing import Final

import torch

from peft_serve.adapters.base import SiteKind, SiteSpec
from peft_serve.adapters.primitives import Adapter, Affine, LowRank
from peft_serve.core import AdapterId
from peft_serve.model.base import ResidentBase

ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "q", "k", "v", "o", "query", "key", "value")
_SPREAD: Final = 0.02


def lora(base: ResidentBase, name: str, rank: int, *, seed: int, attention_only: bool = False) -> Adapter:
    """Factors at every linear layer of the body, or of attention; they lie on the base's device."""
    generator = torch.Generator(base.device).manual_seed(seed)
    sites = {}
    for path, spec in base.sites.items():
        if _is_ours(base, spec, attention_only=attention_only):
            a_RI, b_OR = (
                torch.empty(size, dtype=base.dtype, device=base.device).normal_(0.0, _SPREAD, generator=generator)
                for size in ((rank, spec.in_features), (spec.out_features, rank))
            )
            sites[path] = Affine(delta=LowRank(a_RI, b_OR))
    return Adapter(id=AdapterId(f"sha256:{name}"), method="LORA", sites=sites)


def on_host(adapter: Adapter) -> Adapter:
    """The same adapter as the host's cache holds it."""
    sites = {}
    for path, edit in adapter.sites.items():
        assert isinstance(edit, Affine)
        assert edit.delta is not None
        sites[path] = Affine(delta=LowRank(edit.delta.a_RI.cpu(), edit.delta.b_OR.cpu()))
    return Adapter(id=adapter.id, method=adapter.method, sites=sites)


def renamed(adapter: Adapter, name: str) -> Adapter:
    """Another adapter over the same numbers: it takes no memory of its own."""
    return Adapter(id=AdapterId(f"sha256:{name}"), method=adapter.method, sites=adapter.sites)


def _is_ours(base: ResidentBase, spec: SiteSpec, *, attention_only: bool) -> bool:
    if spec.kind is not SiteKind.LINEAR or spec.out_features == base.shape.vocab_size:
        return False
    return not attention_only or spec.path.rpartition(".")[2] in ATTENTION
