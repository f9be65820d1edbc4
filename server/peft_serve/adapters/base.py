"""The base model as adapters see it: sites by path, their weights, and the few facts of its shape.

The model floor implements `Base` over a resident transformers model; tests implement it with a dictionary.
Nothing here knows transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor


class SiteKind(StrEnum):
    """What kind of module a site is; it decides the layout of weights and how a term applies."""

    LINEAR = "linear"  # weight [out, in]
    CONV1D = "conv1d"  # transformers' Conv1D (GPT-2): weight stored [in, out]
    EMBEDDING = "embedding"  # weight [vocab, d]: in features = vocab, out features = d
    NORM = "norm"  # weight [d], maybe bias [d]
    EXPERTS = "experts"  # the fused parameters of a mixture of experts, [experts, ...] each
    ROUTER = "router"  # of a mixture of experts, where it is no linear layer: weight [experts, d], maybe bias
    ATTENTION = "attention"  # an attention module as a whole; out = in = hidden size, no parameters of its own
    SUBLAYER = "sublayer"  # a residual sublayer as a whole, by the path AdapterHub names it; no parameters of its own
    LAYER = "layer"  # what leaves a layer, by the path AdapterHub names it; no parameters of its own


HAS_WEIGHT = frozenset({SiteKind.LINEAR, SiteKind.CONV1D, SiteKind.EMBEDDING, SiteKind.NORM})
"""Kinds whose `Base.weight` can be asked for."""

WITHOUT_MODULE = frozenset({SiteKind.SUBLAYER, SiteKind.LAYER})
"""Kinds whose path is no module's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSpec:
    """A place in the base where primitives act. `path` is the module path in the transformers model."""

    path: str
    kind: SiteKind
    out_features: int  # for a norm: d, and in_features = d
    in_features: int
    parameters: Mapping[str, tuple[int, ...]]  # the module's own parameter names and shapes, as stored
    embed_scale: float = 1.0  # Gemma-like embeddings multiply their output
    is_transposed: bool = False  # experts only: parameters are stored [experts, in, out], not [experts, out, in]

    @property
    def has_bias(self) -> bool:
        return "bias" in self.parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseShape:
    """The numbers a sequence-level primitive is checked against."""

    hidden_size: int  # width of the embeddings a soft prompt stands among
    vocab_size: int
    num_layers: int  # layers with a (decoder) self-attention cache
    num_heads: int  # query heads
    num_kv_heads: int
    head_dim: int
    max_positions: int
    is_encoder_decoder: bool
    is_encoder: bool = False  # nothing but an encoder: it generates no text, heads read its last hidden states
    generates: bool = True  # False: no language-model head, so it serves heads and hidden states alone
    num_states: int = 0  # width of the last hidden states; 0: as wide as the embeddings

    @property
    def state_size(self) -> int:
        """Width of the last hidden states, which task heads read."""
        return self.num_states or self.hidden_size


class NoValues(LookupError):  # noqa: N818 - it says what a base is short of
    """The base is an outline: its sites and shapes are known, and no weight of it was read."""


class Base(Protocol):
    """The resident base, read-only. `weight`, `parameter` and `bias` raise `NoValues` where it is an outline."""

    @property
    def name(self) -> str:
        """The name it is served under (hub id or folder name)."""
        ...

    @property
    def class_name(self) -> str:
        """The transformers class, for example `LlamaForCausalLM`."""
        ...

    @property
    def family(self) -> str:
        """transformers' `model_type`, for example `llama`."""
        ...

    @property
    def shape(self) -> BaseShape: ...

    @property
    def body_prefix(self) -> str:
        """The attribute under which the task classes of this kind of model keep the body: `model`, `bert`.

        Site paths may begin with it or not; a checkpoint's may differ from them in this."""
        ...

    @property
    def beside_body(self) -> frozenset[str]:
        """Sites behind the body, which other task classes of this kind of model lack: a head, a pooler."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype compiled primitives must have."""
        ...

    @property
    def sites(self) -> Mapping[str, SiteSpec]:
        """Every site by its module path, in module order."""
        ...

    @property
    def tied(self) -> tuple[frozenset[str], ...]:
        """Groups of site paths that share one weight (an embedding and the head of a tied model)."""
        ...

    def weight(self, path: str) -> Tensor:
        """The site's weight as a float32 [out, in] matrix ([d] for a norm), whatever the module stores.

        An embedding gives [d, vocab]."""
        ...

    def parameter(self, path: str, name: str) -> Tensor:
        """Any parameter of a site, float32, as the module stores it."""
        ...

    def bias(self, path: str) -> Tensor | None:
        """The site's bias as a float32 [out] vector, or None."""
        ...
