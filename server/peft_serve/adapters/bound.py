"""The tensors of a checkpoint at their places in the base, once each has one. Knows no keys and no rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from peft_serve.adapters.base import HAS_WEIGHT, Base, SiteKind, SiteSpec
from peft_serve.adapters.header import StoredTensor
from peft_serve.adapters.heads import BoundHead


@dataclass(slots=True)
class BoundSite:
    """The tensors of one site by what they are: the method's, the site's own retrained, copies of the base's."""

    spec: SiteSpec
    method: dict[str, StoredTensor] = field(default_factory=dict)
    saved: dict[str, StoredTensor] = field(default_factory=dict)
    copies: dict[str, StoredTensor] = field(default_factory=dict)
    rank: int = 0
    is_named: bool = False  # the method acts here though it saves nothing here

    @property
    def is_target(self) -> bool:
        """Whether the method acts here."""
        return bool(self.method) or self.is_named

    @property
    def is_retrained(self) -> bool:
        """Whether all of the site's own parameters are in the checkpoint."""
        return bool(self.saved) and self.saved.keys() == self.spec.parameters.keys()


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """Where everything goes. `shared` are the method's tensors that belong to no site."""

    sites: Mapping[str, BoundSite]
    shared: Mapping[str, StoredTensor]
    head: BoundHead | None = None
    num_twins: int = 0  # tensors in the file that say again, and alike, what another one says

    @property
    def targets(self) -> tuple[SiteSpec, ...]:
        """Every site the method acts on, in the module order of the base."""
        return tuple(site.spec for site in self.sites.values() if site.is_target)

    @property
    def num_tensors(self) -> int:
        num_head = 0 if self.head is None else len(self.head.tensors)
        at_sites = sum(len(s.method) + len(s.saved) + len(s.copies) for s in self.sites.values())
        return num_head + len(self.shared) + at_sites + self.num_twins


def same_as_base(tensor: StoredTensor, spec: SiteSpec, parameter: str, base: Base) -> bool:
    """Whether a saved parameter is the base's own, to the precision the base is served in."""
    if spec.kind not in HAS_WEIGHT:
        return False
    own = base.bias(spec.path) if parameter == "bias" else base.weight(spec.path)
    if own is None:
        return False
    mine = tensor.load()
    if parameter == "weight" and spec.kind in (SiteKind.CONV1D, SiteKind.EMBEDDING):
        mine = mine.T  # these modules store [in, out]; the base gives [out, in]
    return own.shape == mine.shape and torch.equal(mine.to(base.dtype), own.cpu().to(base.dtype))
