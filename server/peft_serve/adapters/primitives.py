"""Primitives: what an adapter is once its PEFT method has been compiled away.

A dense site of the frozen base (Linear, Conv1D, Embedding) is served in one normal form,

    y = M_out( s_out * ( W M_in( s_in * x ) + b ) ) + B A x + sum_k D_k x + c

in which every term is optional (absent = identity or zero) and all scaling is folded into B and D_k at compile time,
the output scale of a scaled embedding (Gemma's) included. W is the base's, or has some of its rows exchanged (`Rows`).
Everything else replaces a site's own parameters, acts on a whole sublayer (`sublayer_primitives`), or happens at
sequence level. The executor sees these terms and never a method.

Tensors are in the base's compute dtype, on the host, contiguous but for a low-rank B, which lies turned (`layout`).
Shapes: `o` out features, `i` in features, `r` rank, `d` hidden size, `P` virtual tokens, `L` layers, `H` key/value
heads, `D` head size, `E` experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import TypeVar

import torch
from torch import Tensor

from peft_serve.adapters.shared_primitives import Rescaled, SharedBases
from peft_serve.adapters.sublayer_primitives import Bottleneck, Coupling, Intervention
from peft_serve.adapters.transform_primitives import Circulant, Spectrum
from peft_serve.core import BASE, AdapterId, Footprint

P = TypeVar("P")

# ---- linear maps beside the base's own


@dataclass(frozen=True, slots=True)
class LowRank:
    """x -> B A x. At an embedding site: ids -> B A[:, ids]."""

    a_RI: Tensor
    b_OR: Tensor

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]


@dataclass(frozen=True, slots=True)
class Dense:
    """x -> W x: any other linear map, at the price of one matrix per adapter and site."""

    weight_OI: Tensor


@dataclass(frozen=True, slots=True)
class Kronecker:
    """x -> (L kron R) x without making the product: o = rows(L) rows(R), i = columns(L) columns(R)."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True, slots=True)
class Sparse:
    """x -> S x, S given by its entries; entries at one place add up."""

    out_N: Tensor  # int64
    in_N: Tensor  # int64
    values_N: Tensor


LinearMap = Rescaled | SharedBases | Dense | Kronecker | Sparse | Circulant | Spectrum
"""A map beside the low-rank one: y = y + D x."""


# ---- mixers of what goes into a site, or comes out of it


@dataclass(frozen=True, slots=True)
class BlockDiagonal:
    """x -> concat_k(x_k R_k), x cut into n parts of size k."""

    blocks_NKK: Tensor


@dataclass(frozen=True, slots=True)
class Paired:
    """y -> own * y + other * y', where y' is y with the two halves of each `group` of features exchanged (RoAd)."""

    own_O: Tensor
    other_O: Tensor
    group: int


Mixer = BlockDiagonal | Paired


# ---- what happens at one site


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of the site's table, exchanged: of an embedding's [vocab, d], of a head's weight [vocab, i].

    Values are unscaled: a scaled embedding scales them as it scales its own.
    """

    ids_N: Tensor  # int64, distinct
    values_ND: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """The normal form of a dense site; see the module's docstring."""

    rows: Rows | None = None
    in_scale: Tensor | None = None  # [i]
    in_mix: BlockDiagonal | None = None
    out_scale: Tensor | None = None  # [o]
    out_mix: Mixer | None = None
    delta: LowRank | None = None
    maps: tuple[LinearMap, ...] = ()
    shift: Tensor | None = None  # [o]


@dataclass(frozen=True, slots=True)
class Replace:
    """The site's own parameters, replaced: a tuned norm, a saved head, a saved embedding.

    `state` has the names the module itself uses (`weight`, `bias`), in the module's own layout.
    """

    state: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class ExpertFactors:
    """Low-rank terms of a stack of experts: W_e + B_e A_e."""

    a_ERI: Tensor
    b_EOR: Tensor


@dataclass(frozen=True, slots=True)
class Experts:
    """Low-rank terms on the fused parameters of a mixture of experts, by parameter name (`gate_up_proj`)."""

    factors: Mapping[str, ExpertFactors]


@dataclass(frozen=True, slots=True)
class GatedPrompt:
    """An attention site: o + gate * softmax(q K^T / sqrt(D)) V beside what attention gives, q after rotary positions.

    Keys and values are those of a learned prompt, without positions (LLaMA-Adapter). `is_projected` says whether the
    addition goes through the site's output projection (Llama) or is added behind it (GPT-2).
    """

    keys_HPD: Tensor
    values_HPD: Tensor
    gate: Tensor  # [1]
    is_projected: bool


Edit = Affine | Replace | Experts | GatedPrompt | Bottleneck | Coupling | Intervention
"""What an adapter does at one site."""


# ---- sequence level


@dataclass(frozen=True, slots=True)
class SoftPrompt:
    """Embeddings in front of the tokens; on an encoder-decoder, of the encoder's tokens.

    `is_bare`, on an encoder only: they enter the first layer as they are, without position, type or norm, and the
    tokens behind them count their positions from 0 (AdapterHub).
    """

    embeddings_PD: Tensor
    is_bare: bool = False


@dataclass(frozen=True, slots=True)
class KVPrefix:
    """Keys and values in front of those that an attention has of its own.

    `advances_positions`: the tokens behind it count their positions from P on (peft), or from 0 (AdapterHub).
    Layers can be left out of a prefix only if it does not advance positions.
    """

    keys_LHPD: Tensor
    values_LHPD: Tensor
    advances_positions: bool = True
    absent: frozenset[int] = frozenset()  # layers that have none of it; zeros stand in their place


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefixes:
    """What stands in front of a sequence: a soft prompt, a prefix for each kind of attention, as in `Adapter`."""

    prompt: SoftPrompt | None = None
    own: KVPrefix | None = None
    source: KVPrefix | None = None
    cross: KVPrefix | None = None


class HeadTask(StrEnum):
    """What a task head computes from the last hidden states."""

    SEQUENCE = "SEQ_CLS"  # logits of the whole sequence
    TOKENS = "TOKEN_CLS"  # logits of every token
    SPANS = "QUESTION_ANS"  # start and end logits of every token


@dataclass(frozen=True, slots=True)
class Head:
    """A task head: the parameters of the modules behind the body, by their path in the task's transformers class.

    For example `classifier.weight`, `classifier.out_proj.bias`, `score.weight`, `qa_outputs.weight`.
    """

    task: HeadTask
    state: Mapping[str, Tensor]


# ---- the whole


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Adapter:
    """A compiled checkpoint: edits by site path of the base, and what stands in front of the sequence.

    One equals itself alone, so that what is found out about it can be kept as long as it lives.
    """

    id: AdapterId
    method: str  # the peft_type it came from, for people and metrics only
    sites: Mapping[str, Edit] = field(default_factory=dict)
    prompt: SoftPrompt | None = None
    prefix: KVPrefix | None = None  # of the (decoder's) self-attention
    source_prefix: KVPrefix | None = None  # of the encoder's, on an encoder-decoder
    cross_prefix: KVPrefix | None = None  # in front of the encoded source, on an encoder-decoder
    head: Head | None = None
    start: tuple[int, ...] = ()  # token ids whose last occurrence in the prompt switches the adapter on (aLoRA)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor the adapter holds, one that several sites share once."""
        yield from {id(tensor): tensor for tensor in tensors_of(self)}.values()

    @property
    def max_rank(self) -> int:
        """The largest low-rank term."""
        ranks = (e.delta.rank for e in self.sites.values() if isinstance(e, Affine) and e.delta is not None)
        return max(ranks, default=0)

    def footprint(self, *, is_encoder_decoder: bool, is_encoder: bool = False) -> Footprint:
        """What the adapter asks of the device when it is resident.

        An encoder keeps nothing between steps: there every virtual token is one of the source's."""
        num_prompt = 0 if self.prompt is None else self.prompt.embeddings_PD.shape[0]
        num_prefix = 0 if self.prefix is None else self.prefix.keys_LHPD.shape[2]
        return Footprint(
            num_bytes=sum(t.numel() * t.element_size() for t in self.tensors()),
            max_rank=self.max_rank,
            num_prefix_tokens=0 if is_encoder else num_prefix + (0 if is_encoder_decoder else num_prompt),
            num_source_tokens=num_prompt + num_prefix if is_encoder else num_prompt if is_encoder_decoder else 0,
            num_cross_tokens=0 if self.cross_prefix is None else self.cross_prefix.keys_LHPD.shape[2],
            num_unplaced=self._num_unplaced,
            start=self.start,
            kv_key=self._kv_key(),
            is_causal=not any(isinstance(edit, Intervention) for edit in self.sites.values()),
        )

    @property
    def _num_unplaced(self) -> int:
        prefix, prompt = self.prefix, self.prompt
        num_prefix = 0 if prefix is None or prefix.advances_positions else prefix.keys_LHPD.shape[2]
        return num_prefix + (prompt.embeddings_PD.shape[0] if prompt is not None and prompt.is_bare else 0)

    def _kv_key(self) -> str | None:
        """What the keys and values behind it depend on, where that is cheap to say: a head changes none of them.

        Adapters that are nothing but one and the same soft prompt or prefix are one to everybody behind it.
        """
        if self.sites or self.source_prefix is not None or self.cross_prefix is not None:
            return None
        digest = blake2b(digest_size=32)
        if self.prefix is not None:
            digest.update(repr((self.prefix.advances_positions, sorted(self.prefix.absent))).encode())
        for part in (self.prompt, self.prefix):
            digest.update(type(part).__name__.encode())
            for tensor in tensors_of(part):
                digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return BASE if self.prompt is None and self.prefix is None else digest.hexdigest()


def tensors_of(value: object) -> Iterator[Tensor]:
    """Every tensor in a primitive, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for part in dataclasses.fields(value):
            yield from tensors_of(getattr(value, part.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_of(item)


def mapped(primitive: P, function: Callable[[Tensor], Tensor]) -> P:
    """The same primitive with `function` applied to each of its floating-point tensors; indices stay as they are."""
    return _mapped(primitive, function)  # type: ignore[return-value]  # the walk keeps every type


def _mapped(value: object, function: Callable[[Tensor], Tensor]) -> object:
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: _mapped(part, function) for name, part in parts.items()})
    if isinstance(value, Mapping):
        return {key: _mapped(item, function) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_mapped(item, function) for item in value)
    return value


def is_finite(adapter: Adapter) -> bool:
    """Whether every value of the adapter is finite."""
    return all(bool(torch.isfinite(t).all()) for t in adapter.tensors() if t.is_floating_point())
