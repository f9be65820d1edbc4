"""Primitives: what an adapter is once its PEFT method has been compiled away.

A dense site of the frozen base (Linear, Conv1D, Embedding) is served in one normal form,

    y = s_out * (W (s_in * x) + b) + B A x + c

in which every term is optional (absent = identity or zero) and all scaling is folded into B at compile time, the
output scale of a scaled embedding (Gemma's) included.
Everything else replaces a site's own parameters, or happens at sequence level. The executor sees these terms
and never a method.

Tensors are in the base's compute dtype, on the host, contiguous. Shapes: `o` out features, `i` in features,
`r` rank, `d` hidden size, `P` virtual tokens, `L` layers, `H` key/value heads, `D` head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peft_serve.core import AdapterId, Footprint


@dataclass(frozen=True, slots=True)
class LowRank:
    """x -> B A x. At an embedding site: ids -> B A[:, ids]."""

    a_RI: Tensor
    b_OR: Tensor

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """The normal form of a dense site; see the module's docstring."""

    delta: LowRank | None = None
    in_scale: Tensor | None = None  # [i]
    out_scale: Tensor | None = None  # [o]
    shift: Tensor | None = None  # [o]

    def tensors(self) -> Iterator[Tensor]:
        if self.delta is not None:
            yield self.delta.a_RI
            yield self.delta.b_OR
        for vector in (self.in_scale, self.out_scale, self.shift):
            if vector is not None:
                yield vector


@dataclass(frozen=True, slots=True)
class Replace:
    """The site's own parameters, replaced: a tuned norm, a saved head, a saved embedding.

    `state` has the names the module itself uses (`weight`, `bias`), in the module's own layout.
    """

    state: Mapping[str, Tensor]

    def tensors(self) -> Iterator[Tensor]:
        yield from self.state.values()


Edit = Affine | Replace
"""What an adapter does at one site."""


@dataclass(frozen=True, slots=True)
class SoftPrompt:
    """Embeddings in front of the tokens; on an encoder-decoder, of the encoder's tokens."""

    embeddings_PD: Tensor


@dataclass(frozen=True, slots=True)
class KVPrefix:
    """Keys and values in front of the (decoder's) self-attention cache. Positions advance by P, as in peft."""

    keys_LHPD: Tensor
    values_LHPD: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A compiled checkpoint: edits by site path of the base, and what stands in front of the sequence."""

    id: AdapterId
    method: str  # the peft_type it came from, for people and metrics only
    sites: Mapping[str, Edit] = field(default_factory=dict)
    prompt: SoftPrompt | None = None
    prefix: KVPrefix | None = None

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor the adapter holds."""
        for edit in self.sites.values():
            yield from edit.tensors()
        if self.prompt is not None:
            yield self.prompt.embeddings_PD
        if self.prefix is not None:
            yield self.prefix.keys_LHPD
            yield self.prefix.values_LHPD

    def footprint(self, *, is_encoder_decoder: bool) -> Footprint:
        """What the adapter asks of the device when it is resident."""
        ranks = [e.delta.rank for e in self.sites.values() if isinstance(e, Affine) and e.delta is not None]
        num_prompt = 0 if self.prompt is None else self.prompt.embeddings_PD.shape[0]
        num_prefix = 0 if self.prefix is None else self.prefix.keys_LHPD.shape[2]
        return Footprint(
            num_bytes=sum(t.numel() * t.element_size() for t in self.tensors()),
            max_rank=max(ranks, default=0),
            num_prefix_tokens=num_prefix + (0 if is_encoder_decoder else num_prompt),
            num_source_tokens=num_prompt if is_encoder_decoder else 0,
        )


def is_finite(adapter: Adapter) -> bool:
    """Whether every value of the adapter is finite."""
    return all(bool(torch.isfinite(t).all()) for t in adapter.tensors())
