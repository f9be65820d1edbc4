"""Bottlenecks: small networks beside a residual sublayer (AdapterHub; arXiv:1902.00751, 2005.00247, 2110.04366).

keep + scale * up(act(down(read))), with norms of the adapter's own where it has some. Adapters of one form whose
runs are of one length share two batched products.

Shapes: `G` runs of one length, `P` tokens of each, `B` bottleneck features, `D` features of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, leaky_relu
from transformers.activations import ACT2FN

from peft_serve.adapters.primitives import mapped
from peft_serve.adapters.sublayer_primitives import Bottleneck, LearnedNorm, Reads
from peft_serve.kernels.bottleneck import BottleneckKernels
from peft_serve.kernels.subsets import Batch, Tokens
from peft_serve.model.routing import Route
from peft_serve.model.terms.lifted import Lifted, LiftedPart

Activation = Callable[[Tensor], Tensor]
_Form = tuple[object, ...]
_NORM_EPS = 1e-5


def activation_of(name: str) -> Activation:
    """The function that AdapterHub means by a name."""
    if name == "leakyrelu":
        return leaky_relu
    function: Activation = ACT2FN[name]
    return function


class Part(Protocol):
    """Some adapters' tokens, and what becomes of them."""

    @property
    def subset(self) -> Tokens: ...

    @property
    def is_final(self) -> bool: ...

    @property
    def streams(self) -> frozenset[Reads]: ...

    def of(self, streams: Mapping[Reads, Tensor]) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class StackedNorm:
    """The norms that some runs' adapters bring along."""

    weight_G1D: Tensor
    bias_G1D: Tensor

    def of(self, x_GPD: Tensor) -> Tensor:
        return layer_norm(x_GPD, x_GPD.shape[-1:], eps=_NORM_EPS) * self.weight_G1D + self.bias_G1D


@dataclass(frozen=True, slots=True, kw_only=True)
class BottleneckPart:
    """Runs of one length whose adapters have bottlenecks of one form."""

    batch: Batch
    down_GDB: Tensor
    down_bias_G1B: Tensor
    up_GBD: Tensor
    up_bias_G1D: Tensor
    scale_G1D: Tensor
    activation: Activation
    reads: Reads
    keeps: Reads
    norm_before: StackedNorm | None
    norm_after: StackedNorm | None
    norms_kept: bool
    is_final: bool

    @property
    def subset(self) -> Tokens:
        """Its tokens."""
        return self.batch.subset

    @property
    def streams(self) -> frozenset[Reads]:
        """What of the sublayer it has to see."""
        return frozenset({self.reads, self.keeps})

    def of(self, streams: Mapping[Reads, Tensor]) -> Tensor:
        """What becomes of its tokens, [G P, D], from the streams [T, D] that it has to see."""
        x_GPD = self.batch.take(streams[self.reads])
        if self.norm_before is not None:
            x_GPD = self.norm_before.of(x_GPD)
        low_GPB = self.activation(torch.baddbmm(self.down_bias_G1B, x_GPD, self.down_GDB))
        y_GPD = torch.baddbmm(self.up_bias_G1D, low_GPB, self.up_GBD) * self.scale_G1D
        kept_GPD = self.batch.take(streams[self.keeps])
        if self.norm_after is None:
            y_GPD = y_GPD + kept_GPD
        elif self.norms_kept:
            y_GPD = self.norm_after.of(y_GPD + kept_GPD)
        else:
            y_GPD = self.norm_after.of(y_GPD) + kept_GPD
        return y_GPD.flatten(0, 1)


class Bottlenecks:
    """Those of the installed adapters at one sublayer: with a kernel where there is one that can, see `lifted`."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._edits: dict[int, Bottleneck] = {}
        self._lifted = Lifted(like)

    def __bool__(self) -> bool:
        return bool(self._edits) or bool(self._lifted)

    def use(self, kernel: BottleneckKernels) -> None:
        """Run by the kernel from now on, where it can. No adapter is here yet."""
        assert not self, "the choice is made before adapters are installed"
        self._lifted.kernel = kernel

    def put(self, slot: int, edit: Bottleneck) -> None:
        """Keep an adapter's bottleneck."""
        if self._lifted.serves(edit):
            self._lifted.put(slot, edit)
        else:
            self._edits[slot] = mapped(edit, lambda tensor: tensor.to(self._like))

    def drop(self, slot: int) -> None:
        """Forget the slot, if it has something here."""
        self._edits.pop(slot, None)
        self._lifted.drop(slot)

    def clear(self) -> None:
        """Forget all of them."""
        self._edits.clear()
        self._lifted.clear()

    def parts(self, route: Route) -> tuple[BottleneckPart | LiftedPart, ...]:
        """What the bottlenecks of the active slots do."""
        return (*parts_of(self._edits, route), *self._lifted.parts(route))


def parts_of(edits: Mapping[int, Bottleneck], route: Route) -> tuple[BottleneckPart, ...]:
    """The bottlenecks of the active slots, those of one form and of runs of one length stacked."""
    by_form: dict[_Form, set[int]] = {}
    for slot in route.active.intersection(edits):
        by_form.setdefault(_form_of(edits[slot]), set()).add(slot)
    parts: list[BottleneckPart] = []
    for slots in by_form.values():
        each = route.batches(frozenset(slots))
        parts += (_stacked(alike.batch, [edits[slot] for slot in alike.slots]) for alike in each)
    return tuple(parts)


def _form_of(edit: Bottleneck) -> _Form:
    has_norms = (edit.norm_before is not None, edit.norm_after is not None, edit.norms_kept)
    return (edit.down_BD.shape[0], edit.activation, edit.reads, edit.keeps, *has_norms, edit.is_final)


def _stacked(batch: Batch, edits: Sequence[Bottleneck]) -> BottleneckPart:
    first = edits[0]
    return BottleneckPart(
        batch=batch,
        down_GDB=stack([edit.down_BD for edit in edits]).transpose(1, 2),
        down_bias_G1B=stack([edit.down_bias_B for edit in edits])[:, None],
        up_GBD=stack([edit.up_DB for edit in edits]).transpose(1, 2),
        up_bias_G1D=stack([edit.up_bias_D for edit in edits])[:, None],
        scale_G1D=stack([edit.scale.expand_as(edit.up_bias_D) for edit in edits])[:, None],
        activation=activation_of(first.activation),
        reads=first.reads,
        keeps=first.keeps,
        norm_before=_stacked_norm([edit.norm_before for edit in edits]),
        norm_after=_stacked_norm([edit.norm_after for edit in edits]),
        norms_kept=first.norms_kept,
        is_final=first.is_final,
    )


def _stacked_norm(norms: Sequence[LearnedNorm | None]) -> StackedNorm | None:
    there = [norm for norm in norms if norm is not None]
    if not there:
        return None
    assert len(there) == len(norms), "adapters of one form have the same norms"
    return StackedNorm(
        stack([norm.weight_D for norm in there])[:, None], stack([norm.bias_D for norm in there])[:, None]
    )


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """[G, ...], without a copy where one adapter is alone."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))
