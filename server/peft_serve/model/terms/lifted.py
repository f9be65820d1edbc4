"""Bottlenecks by a kernel: those of one form together, whatever their sizes and the lengths of their runs.

Shapes: `G` runs, `N` tokens of all of them, `T` tokens of the stream, `D` features of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from peft_serve.adapters.primitives import mapped
from peft_serve.adapters.sublayer_primitives import Bottleneck, LearnedNorm, Reads
from peft_serve.kernels.bottleneck import BottleneckKernels, Lift, Squeeze, Squeezes
from peft_serve.kernels.subsets import Subset
from peft_serve.model.routing import Route, Run

_NORM_EPS = 1e-5
_Norms = tuple[LearnedNorm | None, LearnedNorm | None]


@dataclass(frozen=True, slots=True)
class RunNorm:
    """The norms that the adapters of some runs bring along."""

    weight_GD: Tensor
    bias_GD: Tensor
    run_N: Tensor  # of each token

    def of(self, x_ND: Tensor) -> Tensor:
        weight_ND, bias_ND = (each.index_select(0, self.run_N) for each in (self.weight_GD, self.bias_GD))
        return layer_norm(x_ND, x_ND.shape[-1:], eps=_NORM_EPS) * weight_ND + bias_ND


@dataclass(frozen=True, slots=True, kw_only=True)
class LiftedPart:
    """The runs whose adapters have bottlenecks of one form."""

    subset: Subset
    lift: Lift
    reads: Reads
    keeps: Reads
    norm_before: RunNorm | None
    norm_after: RunNorm | None
    norms_kept: bool
    is_final: bool

    @property
    def streams(self) -> frozenset[Reads]:
        """What of the sublayer it has to see."""
        return frozenset({self.reads, self.keeps})

    def of(self, streams: Mapping[Reads, Tensor]) -> Tensor:
        """What becomes of its tokens, [N, D], from the streams [T, D] that it has to see."""
        x_TD = streams[self.reads]
        if self.norm_before is not None:
            normed_ND = self.norm_before.of(self.subset.take(x_TD))
            x_TD = x_TD.clone()
            self.subset.put_(x_TD, normed_ND)
        y_ND, kept_ND = self.subset.take(self.lift(x_TD)), self.subset.take(streams[self.keeps])
        if self.norm_after is None:
            return y_ND + kept_ND
        if self.norms_kept:
            return self.norm_after.of(y_ND + kept_ND)
        return self.norm_after.of(y_ND) + kept_ND


class Lifted:
    """The bottlenecks of one sublayer that a kernel computes, if there is one."""

    def __init__(self, like: Tensor) -> None:
        self.kernel: BottleneckKernels | None = None
        self._like = like
        self._squeezes: Squeezes | None = None  # made for the first adapter
        self._forms: dict[int, Bottleneck] = {}  # without values: the kernel has them
        self._norms: dict[int, _Norms] = {}

    def __bool__(self) -> bool:
        return bool(self._forms)

    def serves(self, edit: Bottleneck) -> bool:
        """Whether the kernel computes this one."""
        return self.kernel is not None and self.kernel.serves(self._like, edit.activation)

    def put(self, slot: int, edit: Bottleneck) -> None:
        """Keep an adapter's bottleneck."""
        assert self.kernel is not None, "there is a kernel that serves it"
        if self._squeezes is None:
            self._squeezes = self.kernel.layer(edit.down_BD.shape[1], self._like.dtype)
        norms = (_sent(edit.norm_before, self._like), _sent(edit.norm_after, self._like))
        squeeze = Squeeze(
            down_BD=edit.down_BD,
            down_bias_B=edit.down_bias_B,
            up_DB=edit.up_DB,
            up_bias_D=edit.up_bias_D,
            scale_D=edit.scale.expand_as(edit.up_bias_D),
        )
        self._squeezes.put(slot, squeeze)
        self._forms[slot], self._norms[slot] = mapped(edit, lambda tensor: tensor.to("meta")), norms

    def drop(self, slot: int) -> None:
        """Forget the slot, if it has something here."""
        if self._squeezes is not None:
            self._squeezes.drop(slot)
        self._forms.pop(slot, None)
        self._norms.pop(slot, None)

    def clear(self) -> None:
        """Forget all of them."""
        for slot in list(self._forms):
            self.drop(slot)

    def parts(self, route: Route) -> tuple[LiftedPart, ...]:
        """The bottlenecks of the active slots, those of one form together."""
        by_form: dict[tuple[object, ...], set[int]] = {}
        for slot in route.active.intersection(self._forms):
            by_form.setdefault(_form_of(self._forms[slot]), set()).add(slot)
        return tuple(self._part(route, frozenset(slots)) for slots in by_form.values())

    def _part(self, route: Route, slots: frozenset[int]) -> LiftedPart:
        assert self._squeezes is not None, "somebody has a bottleneck here"
        form, runs = self._forms[min(slots)], route.runs_of(slots)
        return LiftedPart(
            subset=route.subset(slots),
            lift=self._squeezes.op(route.segments_of(slots), form.activation),
            reads=form.reads,
            keeps=form.keeps,
            norm_before=self._norm(runs, 0),
            norm_after=self._norm(runs, 1),
            norms_kept=form.norms_kept,
            is_final=form.is_final,
        )

    def _norm(self, runs: Sequence[Run], which: int) -> RunNorm | None:
        norms = [norm for run in runs if (norm := self._norms[run.slot][which]) is not None]
        if not norms:
            return None
        assert len(norms) == len(runs), "adapters of one form have the same norms"
        lengths = torch.tensor([run.last - run.first for run in runs])
        run_N = torch.repeat_interleave(torch.arange(len(runs)), lengths).to(self._like.device)
        return RunNorm(torch.stack([n.weight_D for n in norms]), torch.stack([n.bias_D for n in norms]), run_N)


def _form_of(edit: Bottleneck) -> tuple[object, ...]:
    has_norms = (edit.norm_before is not None, edit.norm_after is not None, edit.norms_kept)
    return (edit.activation, edit.reads, edit.keeps, *has_norms, edit.is_final)


def _sent(norm: LearnedNorm | None, like: Tensor) -> LearnedNorm | None:
    return None if norm is None else LearnedNorm(norm.weight_D.to(like), norm.bias_D.to(like))
